"""DoRA: forward, every gradient and the magnitudes, beside PEFT's own layer and the formula in higher precision."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear
from made_models import acting
from numerics import check, check_all, same_bits


def dora_pair(dtype: torch.dtype, bias: bool, p: float) -> tuple[FusedLoRALinear, nn.Module]:
    """Our layer and PEFT's with the same numbers."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(24, 16, bias=bias, dtype=dtype))
    layer = FusedLoRALinear.from_linear(
        copy.deepcopy(model[0]), r=4, lora_alpha=8, lora_dropout=p, use_dora=True, init_lora_weights=False
    )
    layer.lora_magnitude_vector.data.mul_(torch.rand(16, dtype=dtype) + 0.5)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=p, use_dora=True, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, model)[0].to(dtype)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.copy_(layer.lora_B)
        theirs.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude_vector)
    return layer, theirs


def dora_by_hand(layer: FusedLoRALinear, x: Tensor, dy: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """Output and gradients in extended precision, the norm held constant; ``keep`` is mask / (1 - p)."""
    parameters = (x, dy, keep, layer.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    x_, dy_, keep_, w, a, b, m = (t.detach().double().numpy().astype(np.longdouble) for t in parameters)
    adapted = w + layer.scaling * b @ a
    norm = np.sqrt((adapted**2).sum(1))
    dropped = x_ * keep_
    y = (x_ - dropped) @ w.T + m / norm * (dropped @ adapted.T)
    if layer.bias is not None:
        y += layer.bias.double().numpy()
    scaled = dy_ * (m / norm)
    exact = {
        "y": y,
        "dx": dy_ @ w * (1 - keep_) + keep_ * (scaled @ adapted),
        "da": layer.scaling * (scaled @ b).T @ dropped,
        "db": layer.scaling * scaled.T @ (dropped @ a.T),
        "dm": (dy_ * (dropped @ adapted.T) / norm).sum(0),
    }
    return {name: torch.from_numpy(value.astype(np.float64)) for name, value in exact.items()}


def run_dora(layer: nn.Module, parameters: list[Tensor], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = layer(x)
    return dict(zip(["y", "dx", "da", "db", "dm"], [y, *torch.autograd.grad(y, [x, *parameters], dy)], strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dora_is_at_least_as_exact_as_pefts(dtype: torch.dtype, bias: bool, p: float) -> None:
    layer, theirs = dora_pair(dtype, bias, p)
    x, dy = torch.randn(10, 24, dtype=dtype), torch.randn(10, 16, dtype=dtype)
    torch.manual_seed(1)
    keep = F.dropout(torch.ones_like(x), p)  # the mask that both draw from this seed
    ours = run_dora(layer, [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector], x, dy)
    adapter = [theirs.lora_A, theirs.lora_B, theirs.lora_magnitude_vector]
    yardstick = run_dora(theirs, [part["default"].weight for part in adapter], x, dy)
    check_all(ours, lambda: dora_by_hand(layer, x, dy, keep), yardstick, dtype)


def test_dora_starts_as_the_base_layer_and_sets_its_magnitudes_anew_for_another_base() -> None:
    layer, linear, x = FusedLoRALinear(8, 6, r=3, use_dora=True), nn.Linear(8, 6), torch.randn(4, 8)
    for base in (nn.Linear(8, 6), linear):
        layer.load_state_dict(base.state_dict(), strict=False)
        exact = copy.deepcopy(base).double()
        check("y", layer(x), partial(exact, x.double()), base(x), torch.float32)
    magnitude = torch.rand(6)
    layer.load_state_dict({"lora_magnitude_vector": magnitude, **linear.state_dict()}, strict=False)
    assert torch.equal(layer.lora_magnitude_vector, magnitude)


def test_dora_leaves_rows_of_zeros_at_zero() -> None:
    linear, x = nn.Linear(8, 6), torch.randn(4, 8)
    linear.weight.data[2] = 0
    layer = FusedLoRALinear.from_linear(linear, r=3, use_dora=True)
    y = layer(x)
    assert torch.equal(y[:, 2], linear.bias[2].expand(4))
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.adapter.values())
    layer.merge()
    assert not layer.weight[2].any()
    assert torch.isfinite(layer.weight).all()


def test_dora_without_dropout_in_evaluation_is_bit_for_bit_dora_without_dropout() -> None:
    layer, x = acting(use_dora=True, lora_dropout=0.5), torch.randn(4, 8)
    plain = copy.deepcopy(layer)
    plain.lora_dropout = 0.0
    assert torch.equal(layer.eval()(x), plain(x))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_doras_gradients_by_finite_differences(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = acting(5, 4, r=2, use_dora=True, dtype=torch.float64, lora_dropout=p)
    norms = layer.row_norms()
    monkeypatch.setattr(layer, "row_norms", lambda: norms)  # the norm is a constant to the gradient

    def run(x: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        torch.manual_seed(2)
        parameters = {"lora_A": a, "lora_B": b, "lora_magnitude_vector": m}
        out: Tensor = torch.func.functional_call(layer, parameters, (x,))
        return out

    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))


def test_dora_under_autocast_runs_in_its_dtype_with_norms_in_fp32() -> None:
    layer, x = acting(use_dora=True), torch.randn(4, 8)
    norms = layer.row_norms()
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(layer.row_norms(), norms)
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None for p in layer.adapter.values())


def test_dora_compiles_in_one_graph() -> None:
    layer, x = acting(use_dora=True, lora_dropout=0.0), torch.randn(4, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
