"""Layers and models over bitsandbytes' weights, for the tests; without the package those are skipped, and say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear
from numerics import check_all, three_ways

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'lora-kernels[quant]'")
import bitsandbytes as bnb

KINDS = ("nf4", "nf4-nested", "fp4", "int8")


def quantised(kind: str, k: int, n: int, dtype: torch.dtype | None = None, bias: bool = True, **options: Any) -> Any:
    """bitsandbytes' own layer K -> N with random weights; ``dtype`` is that of its weight and its products."""
    linear = nn.Linear(k, n, bias, dtype=dtype)
    if kind == "int8":
        made: Any = bnb.nn.Linear8bitLt(k, n, bias, has_fp16_weights=False, **options)
        made.weight = bnb.nn.Int8Params(linear.weight.data, has_fp16_weights=False, requires_grad=False)
    else:
        quant_type, _, nested = kind.partition("-")
        made = bnb.nn.Linear4bit(
            k, n, bias, compute_dtype=dtype, quant_type=quant_type, compress_statistics=bool(nested), **options
        )
        made.weight.data = linear.weight.data
    made.bias = linear.bias
    return made.to("cpu")


def values(layer: Any) -> Tensor:
    """W (N, K) as bitsandbytes gives it, in the dtype that its layer multiplies in."""
    weight = layer.weight
    if isinstance(weight, bnb.nn.Params4bit):
        found: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return found
    scales = weight.SCB if weight.SCB is not None else layer.state.SCB
    return weight.data.float() * scales.mul(1.0 / 127.0).unsqueeze(1)


def adapted(kind: str, k: int, n: int, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A LoRA layer over :func:`quantised` whose adapter's term is about as large as the base's."""
    layer = FusedLoRALinear.from_linear(quantised(kind, k, n, dtype), r=4, lora_alpha=4, **options)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.5)
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.mul_(1.25)
    return layer


def twin(layer: Any, weight: Tensor, dtype: torch.dtype) -> FusedLoRALinear:
    """The same LoRA layer over the dequantised weight in ``dtype``."""
    n, k = weight.shape
    made = FusedLoRALinear(
        k, n, layer.r, layer.lora_alpha, layer.lora_dropout, layer.bias is not None, use_dora=layer.use_dora
    )
    with torch.no_grad():
        made.weight.data = weight.to(dtype)
        if made.bias is not None:
            made.bias.data = layer.bias.to(dtype)
        for name, parameter in layer.adapter.items():
            made.adapter[name].data = parameter.detach().clone()
    return made.train(layer.training)


def results_of(model: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y and every gradient of one pass in the dtype of the model's adapters, dropout drawn from one seed."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dtype = torch.float64 if next(iter(trained.values())).dtype is torch.float64 else x.dtype
    x = x.detach().to(dtype).requires_grad_()
    for parameter in trained.values():
        parameter.grad = None
    torch.manual_seed(1)
    y = model(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad} | {name: p.grad for name, p in trained.items()}


def check_beside(found: dict[str, Tensor], yardstick: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Asserts that each result passes the policy beside the same model over the dequantised weights."""
    assert found.keys() == yardstick.keys() == exact.keys()
    check_all(found, exact, yardstick, found["y" if "y" in found else "lora_A"].dtype)


def check_layer(layer: Any, x: Tensor, dy: Tensor, weight: Tensor) -> None:
    """Asserts that y, dx, dA and dB of ``layer`` without dropout and DoRA pass the policy for the values ``weight``."""
    found = results_of(layer, x, dy)

    def formulas(number: Any) -> dict[str, Any]:
        own = (x, dy, weight, layer.lora_A.to(x.dtype), layer.lora_B.to(x.dtype))
        ix, idy, w, a, b = (number(tensor) for tensor in own)
        h, dh = ix @ a.t(), (idy @ b) * layer.scaling
        y = ix @ w.t() + (h @ b.t()) * layer.scaling
        y = y if layer.bias is None else y + number(layer.bias)
        return {"y": y, "dx": idy @ w + dh @ a, "lora_A": dh.t() @ ix, "lora_B": (idy.t() @ h) * layer.scaling}

    exact, yardstick, errors = three_ways(x.dtype, formulas)
    check_all(found, exact, yardstick, x.dtype, expected=errors)
