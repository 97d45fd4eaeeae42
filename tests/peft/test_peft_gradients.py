"""Gradients and values of fused PEFT models against stock PEFT's, per option.

PEFT's own suite (``scripts/peft_suite.py``) passes with a wrong gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import fuse_peft
from numerics import check, same_bits

pytest.importorskip("peft")
import peft

from lora_kernels import gate
from lora_kernels.gate import run_plain
from lora_kernels.peft import calls, layer
from peft_models import OPTIONS, Option, assert_parity, fused, lora_layers, make, results

BFLOAT16 = torch.bfloat16
SOME = [o for o in OPTIONS if o.name in ("plain", "lora_bias", "conv1d", "two active", "mixed batch")]
every_option = pytest.mark.parametrize("option", OPTIONS, ids=str)


@every_option
def test_parity_in_fp32(option: Option) -> None:
    assert_parity(option)


@every_option
def test_parity_of_fp32_adapters_over_a_bf16_base(option: Option) -> None:
    assert_parity(option, BFLOAT16)


@pytest.mark.parametrize("option", SOME, ids=str)
def test_parity_under_autocast(option: Option) -> None:
    assert_parity(option, autocast=True)


@pytest.mark.parametrize("option", SOME, ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16, torch.float64], ids=str)
def test_parity_with_adapters_of_the_bases_dtype(option: Option, dtype: torch.dtype) -> None:
    assert_parity(option, dtype, dtype)


def _da_flipped(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return run_plain(x, weight, 2 * a.detach() - a, b, *rest)


def _db_unscaled(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Any, scaling: float, *rest: Any) -> Tensor:
    return run_plain(x, weight, a, b.detach() + (b - b.detach()) / scaling, bias, scaling, *rest)


def _dx_without_low_rank(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    base = F.linear(x, weight)
    return run_plain(x.detach(), weight, *rest) + base - base.detach()


def _scaling_dropped(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Any, scaling: float, *rest: Any) -> Tensor:
    return run_plain(x, weight, a, b, bias, 1.0, *rest)


def _last_rank_forgotten(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return run_plain(x, weight, a[:-1], b[:, :-1], *rest)


def _bias_forgotten(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Any, *rest: Any) -> Tensor:
    return run_plain(x, weight, a, b, None, *rest)


FAULTS = [_da_flipped, _db_unscaled, _dx_without_low_rank, _scaling_dropped, _last_rank_forgotten, _bias_forgotten]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_a_seeded_fault_is_caught(
    fault: Callable[..., Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (gate, layer):
        monkeypatch.setattr(module, "run_plain", fault)
    with pytest.raises(AssertionError, match="FAILS"):
        assert_parity(OPTIONS[0], dtype)


@pytest.mark.parametrize("way", ["_rows_in_one_pass", "_rows_by_group"])
def test_rows_of_a_mixed_batch_that_are_exchanged_are_caught(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option's layers are of both ways."""
    right = getattr(layer.FusedLoraLinear, way)
    monkeypatch.setattr(
        layer.FusedLoraLinear, way, lambda self, x, rows, *rest: right(self, x, [*rows[1:], "a0"], *rest)
    )
    with pytest.raises(AssertionError, match="FAILS"):
        assert_parity(SOME[-1])


@pytest.mark.parametrize("autocast", [False, True])
def test_a_mixed_batch_over_fp16_keeps_fp32s_range(autocast: bool) -> None:
    """h beyond 65504, and a B below 6e-5; under autocast PEFT's own overflows, so it is the yardstick without."""
    torch.manual_seed(0)
    stock = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64, dtype=torch.float16)), _of_rank_2(), adapter_name="a0")
    stock.add_adapter("a1", _of_rank_2())
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=50.0 if "lora_A" in name else 1e-5)
    stock.base_model.set_adapter(["a0", "a1"])  # both train
    x, dy = (400 * torch.randn(4, 3, 64)).half(), torch.randn(4, 3, 64).half()

    def run(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        given = x.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=autocast and dtype is torch.float32):
            y = model(given, adapter_names=["a0", "a1", "__base__", "a0"])
        y.backward(dy.to(y.dtype))
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"y": y.detach(), "dx": given.grad} | gradients

    model = copy.deepcopy(stock).eval()
    fuse_peft(model)
    found = run(model.float(), torch.float32) if autocast else run(model, torch.float16)
    exact, yardstick = run(copy.deepcopy(stock).double().eval(), torch.float64), run(stock.eval(), torch.float16)
    assert calls(model).fused == 1
    assert len(found) == 6
    assert found.keys() == exact.keys()
    for name, tensor in found.items():
        check(name, tensor, exact[name], yardstick[name], torch.float16)


def _of_rank_2() -> Any:
    return peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"])


def test_the_losses_of_a_training_are_those_of_pefts() -> None:
    stock = make({"r": 4}, {"r": 3, "lora_alpha": 2, "use_rslora": True})
    stock.base_model.set_adapter(["a0", "a1"])
    models = {"fused": fused(stock), "exact": copy.deepcopy(stock).double(), "yardstick": stock}
    losses = {name: _losses(model) for name, model in models.items()}
    check("losses", losses["fused"], losses["exact"], losses["yardstick"], torch.float32)
    assert losses["fused"][-1] < 0.7 * losses["fused"][0]


def _losses(model: Any) -> Tensor:
    """Of 20 steps of AdamW on one batch."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(3)
    x, target = (torch.randn(64, n, generator=generator, dtype=torch.float64).to(dtype) for n in (24, 16))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_one_rounding_of_y_is_closer_than_pefts_two() -> None:
    """PEFT rounds the base product and then the sum; a fused product is rounded once."""
    stock = make({"r": 8, "lora_alpha": 8, "target_modules": ["lin0"]}, dtype=BFLOAT16, adapter_dtype=BFLOAT16)
    x = torch.randn(256, 24).to(BFLOAT16)
    target = stock.base_model.model.lin0
    exact = copy.deepcopy(target).double()(x.double())
    ours, theirs = ((y.double() - exact).norm() for y in (fused(stock).base_model.model.lin0(x), target(x)))
    assert ours < theirs


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_nothing_but_x_and_h_is_kept_for_backward(p: float) -> None:
    """In bytes of x: PEFT keeps two more where it casts x to fp32, four with dropout; the fused layer less than one."""
    stock = make({"r": 4, "lora_dropout": p, "target_modules": ["lin0"]}, dtype=BFLOAT16)
    x = torch.randn(64, 24).to(BFLOAT16)
    ours, theirs = (_kept(model.base_model.model.lin0, x) for model in (fused(stock), stock))
    assert theirs >= (4.0 if p else 2.0)
    assert ours < 0.5


def _kept(module: Any, x: Tensor) -> float:
    """Bytes that a call keeps beyond x and the parameters, in units of x's."""
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        module(x.requires_grad_()).sum().backward()
    own = {tensor.data_ptr() for tensor in (x, *module.parameters())}
    return sum(size for pointer, size in kept.items() if pointer not in own) / x.nbytes


def _dropping(p: float) -> Any:
    """A model of one fused layer with y = drop(x): W = 0, A = B = 1."""
    settings = {"r": 48, "lora_alpha": 48, "lora_dropout": p, "target_modules": ["0"]}
    model = make(settings, base=lambda: torch.nn.Sequential(torch.nn.Linear(48, 48, bias=False)))
    (target,) = lora_layers(model)
    for module, value in ((target.base_layer, 0.0), (target.lora_A.a0, 1.0), (target.lora_B.a0, 1.0)):
        torch.nn.init.eye_(module.weight.data).mul_(value)
    return fused(model)


def test_dropout_drops_a_share_of_p_and_keeps_the_mean() -> None:
    """Three standard deviations around p; backward has forward's mask; what is kept is scaled by 1 / (1 - p)."""
    p, x = 0.25, torch.ones(512, 48, requires_grad=True)
    y = _dropping(p)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float((y == 0).double().mean()) - p) < 3 * deviation
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - p)))}
    assert same_bits(dx, y.detach())


def test_dropout_is_what_pefts_module_says_now() -> None:
    model, x = _dropping(0.25), torch.ones(64, 48)
    assert bool((model(x) == 0).any())
    assert same_bits(model.eval()(x).detach(), x)
    model.train()
    lora_layers(model)[0].lora_dropout.a0.p = 0.0
    assert same_bits(model(x).detach(), x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks_again(reentrant: bool) -> None:
    model, x = fused(make({"lora_dropout": 0.5})), torch.randn(6, 24)
    torch.manual_seed(0)
    plain = results(model, x)
    torch.manual_seed(0)
    again = results(_Checkpointed(model, reentrant), x)
    assert all(same_bits(again[name.replace("base_model", "model.base_model", 1)], plain[name]) for name in plain)
    assert calls(model).fused == 6


class _Checkpointed(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.model, x, use_reentrant=self.reentrant)
        return y


def test_gradients_arrive_where_an_optimizer_looks_that_was_made_before() -> None:
    model = make()
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fuse_peft(model)
    model(torch.randn(5, 24)).sum().backward()
    assert len(leaves) == 4
    assert all(leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves)
