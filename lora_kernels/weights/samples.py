"""Layers of the packages' own around given values, of each form that is installed: for ``verify`` and ``bench``.

Here, and only here, the packages are imported.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError, MissingExtraError
from . import block_fp8, known
from .packed import Packed

_INT4: Any = torch.int4  # type: ignore[attr-defined]  # PyTorch's stubs do not have it
__all__ = ["KINDS", "check_kinds", "multiple", "packed", "quantised"]


class _Kind(NamedTuple):
    """A form's package, what K and N have to be multiples of, and how its layer is made of an ``nn.Linear``."""

    package: str
    multiple: int
    made: Any


def _four_bits(quant_type: str, nested: bool) -> Any:
    def made(linear: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        n, k = linear.weight.shape
        layer: nn.Module = bnb.nn.Linear4bit(
            k, n, linear.bias is not None, compute_dtype=None, quant_type=quant_type, compress_statistics=nested
        )
        layer.weight.data, layer.bias = linear.weight.data, linear.bias
        return layer.to(linear.weight.device)

    return made


def _eight_bits(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    n, k = linear.weight.shape
    layer: nn.Module = bnb.nn.Linear8bitLt(k, n, linear.bias is not None, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(linear.weight.data.cpu(), has_fp16_weights=False, requires_grad=False)
    layer.bias = linear.bias
    return layer.to(linear.weight.device)


def _of_torchao(kind: str) -> Any:
    def made(linear: nn.Linear) -> nn.Module:
        from torchao import quantization as ao
        from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
        from torchao.quantization.granularity import PerGroup

        numbers = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8": torch.float8_e4m3fn}
        if kind in numbers:
            linear.weight = nn.Parameter(
                MXTensor.to_mx(linear.weight.data, numbers[kind], block_size=32), requires_grad=False
            )
            return linear
        configurations = {
            "torchao-int8": ao.Int8WeightOnlyConfig,
            "torchao-int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=PerGroup(32)),
            "torchao-float8": ao.Float8WeightOnlyConfig,
            "nvfp4": NVFP4WeightOnlyConfig,
        }
        ao.quantize_(linear, configurations[kind]())
        return linear

    return made


def _block_fp8(linear: nn.Linear) -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    n, k = linear.weight.shape
    layer: Any = FP8Linear(k, n, block_size=(128, 128), has_bias=linear.bias is not None).to(linear.weight.device)
    weight: Any = block_fp8.BLOCK_FP8.quantize(layer, layer.weight, linear.weight.data.float())
    layer.weight, layer.bias = weight, linear.bias
    block_fp8.BLOCK_FP8.settle(layer)
    frozen: nn.Module = layer.requires_grad_(False)
    return frozen


KINDS = {
    "nf4": _Kind("bitsandbytes", 2, _four_bits("nf4", False)),
    "nf4-nested": _Kind("bitsandbytes", 2, _four_bits("nf4", True)),
    "fp4": _Kind("bitsandbytes", 2, _four_bits("fp4", False)),
    "int8": _Kind("bitsandbytes", 1, _eight_bits),
    **{
        kind: _Kind("torchao", 32, _of_torchao(kind))
        for kind in ("torchao-int8", "torchao-int4", "torchao-float8", "nvfp4", "mxfp4", "mxfp8")
    },
    "fp8": _Kind("transformers", 1, _block_fp8),
}
_EXTRAS = {"bitsandbytes": "quant", "torchao": "quant", "transformers": "examples"}


def check_kinds(kinds: tuple[str, ...]) -> None:
    """Raises for a form that is not known, and for one whose package is not installed."""
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidArgumentError(f"weights {kind!r} was given: it must be one of {', '.join(KINDS)}.")
        package = KINDS[kind].package
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"weights {kind!r} was given, and needs {package}, which is not installed. Install it with: pip "
                f"install 'lora-kernels[{_EXTRAS[package]}]'"
            )


def multiple(kind: str) -> int:
    """What K and N have to be multiples of."""
    return KINDS[kind].multiple


def quantised(kind: str, weight: Tensor, bias: Tensor | None = None) -> Any:
    """The package's own layer in the form ``kind``, frozen, around the values ``weight`` (N, K).

    Raises:
        MissingExtraError: the package is not installed; the sentence says what to install.
    """
    check_kinds((kind,))
    n, k = weight.shape
    linear: Any = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return KINDS[kind].made(linear)


def packed(kind: str, weight: Tensor) -> Packed:
    """``weight`` (N, K) in the form ``kind``."""
    found = known.packed(quantised(kind, weight.float()))
    assert found is not None
    return found
