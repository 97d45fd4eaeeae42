"""Layers and models over quantised weights, for the tests; a package that is missing takes its kinds away."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear, ops
from numerics import check_all, three_ways

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'lora-kernels[quant]'")
import bitsandbytes as bnb

BITSANDBYTES = ("nf4", "nf4-nested", "fp4", "int8")
TORCHAO = ("ao-int8", "ao-int8-group", "ao-int4", "ao-float8", "ao-nvfp4", "ao-mxfp4", "ao-mxfp8")
FP8 = ("fp8", "fp8-power", "fp8-whole")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


_WITH_TENSORS = "torchao.quantization.quantize_.workflows.int8.int8_tensor"  # torchao 0.15 has others
OTHERS = (
    *(TORCHAO if _is_there(_WITH_TENSORS) else ()),
    *(FP8 if _is_there("transformers.integrations.finegrained_fp8") else ()),
)
KINDS = (*BITSANDBYTES, *OTHERS)
CALLABLE = tuple(kind for kind in KINDS if kind != "int8" and not kind.startswith(("fp8", "ao-mx")))  # on a CPU
_BLOCK = (32, 24)  # of FP8: the last one is a part


def quantised(
    kind: str,
    k: int,
    n: int,
    dtype: torch.dtype | None = None,
    bias: bool = True,
    of: Tensor | None = None,
    **options: Any,
) -> Any:
    """A package's own layer K -> N of random weights or of ``of``; ``dtype``: that of its weight and its products."""
    linear = nn.Linear(k, n, bias, dtype=dtype)
    if of is not None:
        linear.weight.data.copy_(of)
    if kind.startswith("ao-"):
        return _of_torchao(kind, linear)
    if kind.startswith("fp8"):
        return block_fp8(linear, *{"fp8": (_BLOCK,), "fp8-power": (_BLOCK, True), "fp8-whole": (None,)}[kind])
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


def _of_torchao(kind: str, linear: nn.Linear) -> Any:
    from torchao import quantization as ao
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.quantization.granularity import PerGroup

    given = linear.weight.data
    if given.dtype is torch.float16 and kind.startswith(("ao-nv", "ao-mx")):  # not of torchao's
        given = given.float()
    linear.weight = nn.Parameter(given, requires_grad=False)
    if kind.startswith("ao-mx"):
        of = torch.float4_e2m1fn_x2 if kind == "ao-mxfp4" else torch.float8_e4m3fn
        block = 32 if given.shape[1] % 32 == 0 else 16
        linear.weight = nn.Parameter(MXTensor.to_mx(given, of, block_size=block), requires_grad=False)
        return linear
    ao.quantize_(
        linear,
        {
            "ao-int8": ao.Int8WeightOnlyConfig(),
            "ao-int8-group": ao.Int8WeightOnlyConfig(granularity=PerGroup(16)),
            "ao-int4": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
            "ao-float8": ao.Float8WeightOnlyConfig(),
            "ao-nvfp4": NVFP4WeightOnlyConfig(),
        }[kind],
    )
    return linear


def block_fp8(linear: nn.Linear, block: tuple[int, int] | None, power: bool = False) -> Any:
    """transformers' FP8 layer of ``linear``'s values: one scale a ``block``, of the whole where that is None."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    (n, k), has_bias = linear.weight.shape, linear.bias is not None
    made = FP8Linear(k, n, block_size=block, scale_fmt="ue8m0" if power else "float", has_bias=has_bias)
    high, wide = block or (n, k)
    most = torch.zeros(-(-n // high), -(-k // wide))
    weight = linear.weight.detach().float()
    for i in range(most.shape[0]):
        for j in range(most.shape[1]):
            most[i, j] = weight[i * high : (i + 1) * high, j * wide : (j + 1) * wide].abs().max()
    scale = most / torch.finfo(torch.float8_e4m3fn).max
    scale = torch.exp2(torch.ceil(torch.log2(scale))) if power else scale
    spread = scale.repeat_interleave(high, 0)[:n].repeat_interleave(wide, 1)[:, :k]
    made.weight = nn.Parameter((weight / spread).to(torch.float8_e4m3fn), requires_grad=False)
    stored = scale.to(made.weight_scale_inv.dtype)
    made.weight_scale_inv = nn.Parameter(stored if block else stored.reshape(()), requires_grad=False)
    made.bias = linear.bias
    return made


def values(layer: Any) -> Tensor:
    """W (N, K) as its package gives it, in the dtype that its layer multiplies in."""
    weight = layer.weight
    if isinstance(weight, bnb.nn.Params4bit):
        state = copy.copy(weight.quant_state)  # rows that are no whole blocks get others' absmax on AVX-512
        (n, k), state.shape = state.shape, torch.Size((1, state.shape.numel()))
        found: Tensor = bnb.functional.dequantize_4bit(weight.data, state).view(n, k)
        return found
    if isinstance(weight, bnb.nn.Int8Params):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.float() * scales.mul(1.0 / 127.0).unsqueeze(1)
    if hasattr(layer, "weight_scale_inv"):
        scale, (n, k) = layer.weight_scale_inv.data.float(), weight.shape
        if layer.block_size is not None:
            high, wide = layer.block_size
            scale = scale.repeat_interleave(high, 0)[:n].repeat_interleave(wide, 1)[:, :k]
        return weight.data.float() * scale
    found = weight.dequantize()
    return found


def bits_of(layer: nn.Module) -> dict[str, bytes]:
    """The bytes of all that ``layer``'s state dict holds; of a tensor that holds others, theirs."""
    found, left = {}, list(layer.state_dict().items())
    while left:
        name, tensor = left.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            left += [(f"{name}.{inner}", getattr(tensor, inner)) for inner in tensor.__tensor_flatten__()[0]]
        else:
            found[name] = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


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
        k,
        n,
        layer.r,
        layer.lora_alpha,
        layer.lora_dropout,
        layer.bias is not None,
        use_dora=layer.use_dora,
        lora_bias=layer.lora_bias is not None,
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


def check_beside(
    found: dict[str, Tensor],
    yardstick: dict[str, Tensor],
    exact: dict[str, Tensor] | Callable[[], dict[str, Tensor]],
) -> None:
    """Asserts that each result passes the policy beside the same model over the dequantised weights."""
    assert found.keys() == yardstick.keys()
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


def check_products(codes: Any, weight: Tensor, m: int, r: int, dtype: torch.dtype) -> None:
    """Asserts that few tokens' products with codes pass the policy for the values ``weight`` (N, K) in ``dtype``.

    y and l = x Wᵀ + s h Bᵀ with a gain and without, dx = dy W + dh A, and both without an adapter.
    """
    n, k = weight.shape
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    h, lora_b, lora_a = torch.randn(m, r), torch.randn(n, r).to(dtype), torch.randn(r, k).to(dtype)
    bias, gain = torch.randn(n).to(dtype), torch.rand(n) + 0.5
    y, linear = ops.coded_product(x, codes, n, lora_b, h, bias, gain, 0.5, True)
    found = {"y": y, "linear": linear}
    found["plain"], _ = ops.coded_product(x, codes, n, lora_b, h, None, None, 0.5, False)
    found["frozen"], _ = ops.coded_product(x, codes, n, None, None, bias, None, 1.0, False)
    found["dx"] = ops.coded_input_grad(dy, codes, k, h, lora_a, 0.0, None)
    found["frozen dx"] = ops.coded_input_grad(dy, codes, k, None, None, 0.0, None)

    def formulas(number: Any) -> dict[str, Any]:
        product, inner, low = number(x) @ number(weight).t(), number(dy) @ number(weight), number(h)
        linear = product + (low @ number(lora_b).t()) * 0.5
        results = {"y": linear * number(gain) + number(bias), "linear": linear, "plain": linear}
        return results | {"frozen": product + number(bias), "dx": inner + low @ number(lora_a), "frozen dx": inner}

    exact, yardstick, errors = three_ways(dtype, formulas)
    check_all(found, exact, yardstick, dtype, expected=errors)
