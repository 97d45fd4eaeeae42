"""torchao's forms: weight-only tensors of 1 to 8 bits, of float8, NVFP4 and MX, in a plain ``nn.Linear``.

The values are those of the tensor's own ``dequantize``, in the dtype that x is multiplied in. A tensor that quantises x
as well, or scales it, stands for more than a weight; those are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..codes import Codes
from ..errors import LoRAStateError
from ..ops import CodedParts
from . import eight_bits, four_bits
from .by_codes import enter
from .packed import Layout, Packed, package

__all__ = ["FORMS"]

_UNSUPPORTED = torch.float64  # torchao makes values of up to 32 bits
_OF_INPUTS = ("act_quant_kwargs", "activation_quantization", "act_pre_scale", "act_quant_scale")
Rebuild = Callable[[Any, list[Tensor], list[str], torch.dtype], Any]
CodesOf = Callable[[list[Tensor], str, int, int], CodedParts | None]
ValuesOf = Callable[[Any], Tensor]  # what a tensor's `dequantize` gives
Again = Callable[[Any, Any, Tensor], Any]  # a class, a weight of it, values to quantise as that was


class _TensorForm:
    """A class of torchao's: ``qdata``, ``scale`` and what else its tensors have, and what they are read by."""

    package = "torchao"

    def __init__(
        self,
        kind: str,
        tensors: tuple[str, ...],
        settings: tuple[str, ...],
        rebuild: Rebuild,
        again: Again,
        codes: CodesOf | None = None,
        stored: Callable[[Layout], Codes | None] = lambda layout: None,
        values_of: ValuesOf | None = None,
    ) -> None:
        self.kind, self.tensors, self.settings, self.rebuild, self.again = kind, tensors, settings, rebuild, again
        self.values_of = values_of
        self.name, self.codes = f"torchao-{kind}", codes
        enter(self.name, self.values, stored, codes)

    def knows(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward

    def stands_in(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def recover(self, module: Any, weight: Any) -> nn.Parameter:
        kept: nn.Parameter = weight  # conversions and pickles keep the class of a tensor that holds others
        return kept

    def why_not(self, module: Any) -> str | None:
        weight = module._parameters["weight"]
        kind = f"{type(module).__name__} with a {self.kind}"
        if weight.is_meta or getattr(weight, self.tensors[0]).is_meta:
            return f"{kind} is on the meta device. Load its weights first."
        if reason := self._why_not_weight_only(weight):
            return f"{kind} {reason}"
        if tuple(weight.shape) != (module.out_features, module.in_features):
            return (
                f"{kind} has a weight of shape {tuple(weight.shape)} where ({module.out_features}, "
                f"{module.in_features}) is expected: it is a part. Gather the whole weight."
            )
        return None

    @staticmethod
    def _why_not_weight_only(weight: Any) -> str | None:
        for name in _OF_INPUTS:
            if getattr(weight, name, None) is not None:
                return (
                    f"quantizes or scales its input too ({name}). Quantize with one of torchao's weight-only "
                    "configurations, or have PEFT adapt it: fuse_peft then leaves it to PEFT."
                )
        return None

    def read(self, module: Any, weight: Any) -> Packed:
        with torch._C.DisableTorchFunctionSubclass():  # the package answers such questions in Python
            trains, (rows, columns) = weight.requires_grad, weight.shape
        if trains:
            raise LoRAStateError(
                f"a {self.kind} has requires_grad=True, and only adapters train. Call weight.requires_grad_(False)."
            )
        found = [getattr(weight, name, None) for name in self.tensors]
        parts = tuple([part for part in found if part is not None])
        spec = "/".join([_told(getattr(weight, name)) for name in self.settings])
        return Packed(Layout(self.name, spec, rows, columns, len(parts)), parts)

    def prepare(self, module: Any) -> None:
        """Nothing: the tensor stays as it is."""

    def quantize(self, module: Any, weight: Any, values: Tensor) -> nn.Parameter:
        made = self.again(_class(self.kind), weight, values.to(weight.dtype))
        return nn.Parameter(made, requires_grad=False)

    def settle(self, module: Any) -> None:
        """Nothing: the tensor holds all that is known of it."""

    def load(self, module: Any, weight: Any, state_dict: Mapping[str, Any], prefix: str) -> set[str]:
        return set()  # a state dict has the tensor itself

    def values(self, parts: list[Tensor], spec: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        narrow = torch.float32 if dtype is _UNSUPPORTED else dtype
        read = None if self.codes is None else self.codes(parts, spec, rows, columns)
        if (found := eight_bits.values(read, rows, columns, narrow)) is not None:
            return found.to(dtype)
        made = self.rebuild(_class(self.kind), parts, spec.split("/"), narrow)
        values: Tensor = made.dequantize() if self.values_of is None else self.values_of(made)
        return values.to(dtype)


def _told(setting: Any) -> str:
    """A block's sizes, a dtype or a flag as a word."""
    if isinstance(setting, (list, tuple)):
        return ",".join(map(str, setting))
    return str(setting).removeprefix("torch.")


_MX = "torchao.prototype.mx_formats"
_PLACES = {"NVFP4Tensor": f"{_MX}.nvfp4_tensor", "MXTensor": f"{_MX}.mx_tensor"}


def _class(kind: str) -> Any:
    return getattr(package(_PLACES.get(kind, "torchao.quantization")), kind)


def _block(word: str) -> list[int]:
    return [int(size) for size in word.split(",")]


def _stored_bytes(number: str, layout: Layout) -> Codes | None:
    block = layout.spec.split("/")[0]
    if "," not in block:
        return None
    high, wide = _block(block)
    return Codes(number, high, wide, zeros=layout.tensors > 2)


def _int8(kind: Any, parts: list[Tensor], words: list[str], dtype: torch.dtype) -> Any:
    return kind(parts[0], parts[1], _block(words[0]), dtype, zero_point=parts[2] if len(parts) > 2 else None)


def _int8_codes(parts: list[Tensor], spec: str, rows: int, columns: int) -> CodedParts | None:
    """Also of int8 numbers that stand for fewer bits."""
    high, wide = _block(spec.split("/")[0])
    return _read(parts, high, wide)


def _read(parts: list[Tensor], high: int, wide: int) -> CodedParts | None:
    exact = parts[1].dtype in (torch.float32, torch.bfloat16, torch.float16)
    return eight_bits.codes(parts[0], parts[1], high, wide, *parts[2:]) if exact else None


def _int8_again(kind: Any, weight: Any, values: Tensor) -> Any:
    mapping, granularity = _mapping(weight), _granularity(weight.block_size, values.shape)
    return kind.from_hp(values, granularity, mapping, reduce_range=weight.reduce_range)


def _mapping(weight: Any) -> Any:
    """How its zeros were chosen: a symmetric range has none."""
    kinds, zeros = sys.modules["torchao.quantization.quant_primitives"].MappingType, weight.zero_point
    return kinds.SYMMETRIC if zeros is None or not bool(zeros.any()) else kinds.ASYMMETRIC


def _granularity(block: Any, shape: torch.Size) -> Any:
    kinds = sys.modules["torchao.quantization.granularity"]
    if tuple(block) == tuple(shape):
        return kinds.PerTensor()
    if tuple(block) == (1, shape[1]):
        return kinds.PerRow()
    return kinds.PerGroup(block[1]) if block[0] == 1 else kinds.PerBlock(tuple(block))


def _intx(kind: Any, parts: list[Tensor], words: list[str], dtype: torch.dtype) -> Any:
    return kind(*parts, getattr(torch, words[1]), tuple(_block(words[0])), dtype, None)


def _intx_again(kind: Any, weight: Any, values: Tensor) -> Any:
    return kind.from_hp(values, weight.block_size, weight.target_dtype, mapping_type=_mapping(weight))


def _float8(kind: Any, parts: list[Tensor], words: list[str], dtype: torch.dtype) -> Any:
    return kind(*parts, dtype=dtype)


def _float8_codes(parts: list[Tensor], spec: str, rows: int, columns: int) -> CodedParts | None:
    grid = parts[1].shape
    if len(grid) != 2 or 0 in grid or rows % grid[0] or columns % grid[1]:
        return None
    return _read(parts, rows // grid[0], columns // grid[1])


def _float8_again(kind: Any, weight: Any, values: Tensor) -> Any:
    block = weight.block_size or values.shape
    granularity, ways = _granularity(block, values.shape), (weight.mm_config, None, None, weight.kernel_preference)
    return kind.from_hp(values, weight.qdata.dtype, granularity, *ways)


def _nvfp4(kind: Any, parts: list[Tensor], words: list[str], dtype: torch.dtype) -> Any:
    whole = parts[2] if len(parts) > 2 else None
    return kind(parts[0], parts[1], int(words[0]), dtype, whole, is_swizzled_scales=words[1] == "True")


def _nvfp4_values(weight: Any) -> Tensor:
    """By a look-up: `dequantize` takes the bits of each number apart, one operation after the other."""
    if not weight.qdata.is_contiguous():  # codes that lie by columns
        found: Tensor = weight.dequantize()
        return found
    scales: Tensor = weight.get_hp_scales()
    numbers = four_bits.e2m1(weight.qdata).view(*scales.shape, weight.block_size)
    return numbers.mul_(scales.unsqueeze(-1)).view(weight.shape).to(weight.dtype)


def _nvfp4_stored(layout: Layout) -> Codes | None:
    block, swizzled = layout.spec.split("/")
    return Codes("e2m1", 1, int(block), scales="e4m3") if swizzled == "False" else None


def _nvfp4_again(kind: Any, weight: Any, values: Tensor) -> Any:
    whole = weight.per_tensor_scale
    if whole is not None:
        whole = sys.modules[f"{_MX}.nvfp4_tensor"].per_tensor_amax_to_scale(values.abs().max())
    ways = {name: getattr(weight, name) for name in ("is_swizzled_scales", "use_triton_kernel")}
    return kind.to_nvfp4(values, weight.block_size, whole, **ways)


def _mx(kind: Any, parts: list[Tensor], words: list[str], dtype: torch.dtype) -> Any:
    return kind(*parts, getattr(torch, words[0]), int(words[1]), dtype, None, None, words[2] == "True")


def _mx_codes(parts: list[Tensor], spec: str, rows: int, columns: int) -> CodedParts | None:
    """Of MXFP8 and MXFP4; their scales are powers of two."""
    element, block, swizzled = spec.split("/")
    if swizzled == "True" or parts[1].dtype is not torch.float8_e8m0fnu:
        return None
    if element == "float4_e2m1fn_x2":
        return four_bits.mx_codes(parts[0], parts[1], int(block)) if columns % 32 == 0 else None
    return eight_bits.codes(parts[0], parts[1], 1, int(block)) if element == "float8_e4m3fn" else None


def _mx_stored(layout: Layout) -> Codes | None:
    element, block, swizzled = layout.spec.split("/")
    if swizzled == "True":
        return None
    if element == "float4_e2m1fn_x2":
        return Codes("e2m1", 1, int(block), scales="e8m0")
    return Codes("e4m3", 1, int(block)) if element == "float8_e4m3fn" else None


def _mx_again(kind: Any, weight: Any, values: Tensor) -> Any:
    """By the choice of scales that is torchao's default: the tensor does not say which one it was made with."""
    ways = {name: getattr(weight, name) for name in ("kernel_preference", "is_swizzled_scales")}
    return kind.to_mx(values, weight.elem_dtype, weight.block_size, **ways)


FORMS = {
    form.kind: form
    for form in (
        _TensorForm(
            "Int8Tensor",
            ("qdata", "scale", "zero_point"),
            ("block_size",),
            _int8,
            _int8_again,
            _int8_codes,
            partial(_stored_bytes, "int8"),
        ),
        _TensorForm(
            "IntxUnpackedToInt8Tensor",
            ("qdata", "scale", "zero_point"),
            ("block_size", "target_dtype"),
            _intx,
            _intx_again,
            _int8_codes,
            partial(_stored_bytes, "int8"),
        ),
        _TensorForm(
            "Float8Tensor",
            ("qdata", "scale"),
            ("block_size",),
            _float8,
            _float8_again,
            _float8_codes,
            partial(_stored_bytes, "e4m3"),
        ),
        _TensorForm(
            "NVFP4Tensor",
            ("qdata", "scale", "per_tensor_scale"),
            ("block_size", "is_swizzled_scales"),
            _nvfp4,
            _nvfp4_again,
            stored=_nvfp4_stored,
            values_of=_nvfp4_values,
        ),
        _TensorForm(
            "MXTensor",
            ("qdata", "scale"),
            ("elem_dtype", "block_size", "is_swizzled_scales"),
            _mx,
            _mx_again,
            _mx_codes,
            _mx_stored,
        ),
    )
}
