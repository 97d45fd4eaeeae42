"""bitsandbytes' forms: NF4 and FP4 (``Linear4bit``, also with nested statistics) and int8 (``Linear8bitLt``).

The values are those that the package means, bit for bit: its operator makes them, or kernels in C++ or Triton.

On CPUs with AVX512-BF16 the package lays a 4-bit weight out otherwise when its own layer is called in evaluation, with
the statistics rounded to bf16 and stored by columns. Both layouts are read. A layer that is replaced gets the usual
one, with the same values: the package's own way back loses more, and forgets the order of the statistics where they are
not nested.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..codes import Codes
from ..errors import InvalidTypeError, LoRAStateError
from ..ops import CodedParts
from . import eight_bits, four_bits
from .by_codes import enter
from .packed import Layout, Packed, package

__all__ = ["EIGHT_BITS", "FOUR_BITS"]

_TYPES = ("nf4", "fp4")
_CPU = "cpu"  # the layout for AVX512-BF16
_ROWS = 32  # a block of it
_UNSUPPORTED = torch.float64  # bitsandbytes makes values of up to 32 bits


def _package() -> Any:
    return sys.modules["bitsandbytes"]


class _FourBits:
    """``Params4bit``: two codes a byte in row order, and the largest magnitude of each block of numbers."""

    name = "bitsandbytes-4bit"
    package = "bitsandbytes"

    def knows(self, module: nn.Module) -> bool:
        return type(module).forward is _package().nn.Linear4bit.forward

    def stands_in(self, module: nn.Module) -> bool:
        return isinstance(module, _package().nn.Linear4bit)

    def recover(self, module: Any, weight: Any) -> nn.Parameter:
        state = _state_of(module, weight)
        if state is None:
            raise LoRAStateError(f"the 4-bit weight of a layer cannot be read: {self._lost(weight)}")
        return _four_bit_parameter(weight.data, state, module.quant_storage)  # converted since, it may be in another

    def why_not(self, module: nn.Module) -> str | None:
        weight: Any = module._parameters["weight"]
        state = _state_of(module, weight)
        _check_storage(module, weight, weight.dtype, state)
        kind = type(module).__name__
        if weight.is_meta or state is None:
            return (
                f"{kind} has a weight that is not quantized yet: bitsandbytes does that when the layer moves to a "
                "device. Load its weights and call .to(device) first."
            )
        if state.quant_type not in _TYPES:
            return (
                f"{kind} has quant_type={state.quant_type!r}, which is not known here: the types are "
                f"{', '.join(map(repr, _TYPES))}. Quantize it as one of these."
            )
        if state.shape is None or tuple(state.shape) != (module.out_features, module.in_features):
            return (
                f"{kind} has a 4-bit weight of shape {state.shape} where ({module.out_features}, "
                f"{module.in_features}) is expected: it is a part, or was quantized transposed. Quantize the whole "
                "weight (N, K)."
            )
        if weight.requires_grad:
            return f"{kind} has a 4-bit weight that trains. Call weight.requires_grad_(False): only adapters can train."
        return None

    def read(self, module: Any, weight: Any) -> Packed:
        state = _state_of(module, weight)
        with torch._C.DisableTorchFunctionSubclass():  # the package answers such questions in Python
            trains, data = weight.requires_grad, weight.detach()  # a write is then seen, which of .data is not
        if state is None or trains:
            raise LoRAStateError(f"the 4-bit weight of a layer cannot be read: {self._lost(weight)}")
        rows, columns = state.shape
        _check_storage(module, weight, data.dtype, state)
        if not rows * columns <= 2 * data.nbytes < rows * columns + 32:
            raise LoRAStateError(
                f"a 4-bit weight of {rows} x {columns} numbers has {data.nbytes} bytes in {data.dtype}: it is a part. "
                "Gather the whole weight."
            )
        layout = _CPU if getattr(state, "packing_format_for_cpu", False) else ""
        parts: tuple[Tensor, ...] = (data, state.absmax)
        nested = 0
        if state.nested:
            parts += (state.state2.absmax, state.state2.code, state.offset)
            nested = state.state2.blocksize
        spec = f"{state.quant_type}/{state.blocksize}/{nested}/{layout}"
        dtype = getattr(module, "compute_dtype", None)
        return Packed(Layout(self.name, spec, rows, columns, len(parts)), parts, dtype)

    @staticmethod
    def _lost(weight: Any) -> str:
        if weight.requires_grad:
            return "it has requires_grad=True, and only adapters train. Call weight.requires_grad_(False)."
        return "its quantisation state is gone. Assign the Params4bit that bitsandbytes made, with its quant_state."

    def prepare(self, module: Any) -> None:
        weight = module._parameters["weight"]
        state = _state_of(module, weight)
        module.quant_storage = getattr(weight, "quant_storage", module.quant_storage)  # FSDP2 keeps the module's alone
        if not getattr(state, "packing_format_for_cpu", False):
            return
        rows, columns = state.shape
        weight.data = _usual_codes(weight.data, rows, columns).reshape(state.original_qshape)
        if (storage := getattr(state, "original_storage_type", None)) is not None:
            weight.data = weight.data.view(storage)
        state.absmax, state.dtype = _usual_absmax(state.absmax), state.original_dtype
        state.nested, state.state2, state.offset = False, None, None  # the values stay those of the other layout
        state.packing_format_for_cpu = False

    def quantize(self, module: Any, weight: Any, values: Tensor) -> nn.Parameter:
        state, storage = _state_of(module, weight), weight.dtype
        settings = state.blocksize, state.nested, state.quant_type, storage
        data, made = _package().functional.quantize_4bit(values, None, None, *settings)
        made.dtype = state.dtype
        return _four_bit_parameter(data, made)

    def settle(self, module: Any) -> None:
        module.quant_state = module._parameters["weight"].quant_state

    def load(self, module: Any, weight: Any, state_dict: Mapping[str, Any], prefix: str) -> set[str]:
        before = f"{prefix}weight."
        own = {key: value for key, value in state_dict.items() if key.startswith(before)}
        if not own:
            return set()
        kind = _package().functional.QuantState
        state = kind.from_dict({key[len(before) :]: value for key, value in own.items()}, device=weight.device)
        if tuple(state.shape) != (module.out_features, module.in_features):
            raise InvalidTypeError(
                f"the state dict's {prefix}weight is a 4-bit weight {tuple(state.shape)}, and the layer's is "
                f"({module.out_features}, {module.in_features}). Load the state dict of the same model."
            )
        if (stored := state_dict[f"{prefix}weight"].dtype) is not weight.dtype:
            raise InvalidTypeError(
                f"the state dict's {prefix}weight is stored in {stored}, and the layer's in {weight.dtype}: the copy "
                "converted its codes as numbers. Make the model with the same bnb_4bit_quant_storage, or load with "
                "assign=True."
            )
        weight.quant_storage = module.quant_storage = weight.dtype
        weight.quant_state = module.quant_state = state
        weight.blocksize, weight.compress_statistics = state.blocksize, state.nested
        weight.quant_type = state.quant_type
        return set(own)


def _four_bit_parameter(data: Tensor, state: Any, storage: torch.dtype | None = None) -> nn.Parameter:
    made: nn.Parameter = _package().nn.Params4bit(
        data,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=data.dtype if storage is None else storage,
        bnb_quantized=True,
    )
    return made


def _state_of(module: Any, weight: Any) -> Any:
    """The quantisation state: the weight's, or, where a conversion of the Parameter lost it, the module's."""
    state = getattr(weight, "quant_state", None)
    return state if state is not None else getattr(module, "quant_state", None)


def _check_storage(module: Any, weight: Any, dtype: torch.dtype, state: Any) -> None:
    """Raises ``LoRAStateError`` where the codes, bytes that lie in a floating dtype, were converted to another one."""
    own = getattr(weight, "quant_storage", None)  # conversions leave it as it was
    stored = own if own is not None else getattr(module, "quant_storage", None)
    if state is None or stored is None or dtype in (stored, torch.uint8):  # bytes are never converted
        return
    raise LoRAStateError(
        f"a 4-bit weight that is stored in {stored} was converted to {dtype}, and its values are lost: the bytes are "
        "codes. Load the model again, with bnb_4bit_quant_storage=torch.uint8 if it is to be converted. Under FSDP2, "
        "give MixedPrecisionPolicy and bnb_4bit_quant_storage the same dtype."
    )


def _usual_codes(data: Tensor, rows: int, columns: int) -> Tensor:
    """Two codes a byte in row order, uint8 (N, K / 2), of the layout for AVX512-BF16.

    That has blocks of 32 rows; within them a pair of columns after the other, of whose 64 codes (row by row) byte i
    holds the i-th below the (i + 32)-th.
    """
    pairs = data.view(torch.uint8).reshape(rows // _ROWS, columns // 2, _ROWS)
    codes = torch.cat([pairs & 0xF, pairs >> 4], -1).view(rows // _ROWS, columns // 2, _ROWS, 2)
    codes = codes.transpose(1, 2)  # (blocks, rows, pairs of columns, 2)
    return ((codes[..., 0] << 4) | codes[..., 1]).reshape(rows, columns // 2)


def _usual_absmax(absmax: Tensor) -> Tensor:
    return absmax.t().reshape(-1).float()


@lru_cache(maxsize=64)
def _settings(spec: str) -> tuple[str, int, int, bool]:
    """Quantisation type, blocksize, nested blocksize or 0, whether the codes are in the order for AVX512-BF16."""
    quant_type, blocksize, nested, layout = spec.split("/")
    return quant_type, int(blocksize), int(nested), layout == _CPU


def _four_bit_values(parts: list[Tensor], spec: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    quant_type, blocksize, nested, by_columns = _settings(spec)
    narrow = torch.float32 if dtype is _UNSUPPORTED else dtype
    found = four_bits.values(parts, quant_type, blocksize, nested, rows, columns, narrow, by_columns)
    if found is not None:
        return found.to(dtype)
    data, absmax = parts[0], parts[1]
    if by_columns:
        data, absmax = _usual_codes(data, rows, columns).reshape(-1, 1), _usual_absmax(absmax)
    package("bitsandbytes")
    operators = torch.ops.bitsandbytes
    if nested:
        absmax = operators.dequantize_blockwise.default(absmax, parts[2], parts[3], nested, torch.float32)
        absmax = absmax + parts[4]
    # Of rows that are not whole blocks the package's AVX-512 code takes other blocks' absmax, but not of one long row.
    shape = (rows, columns) if columns % blocksize == 0 else (1, rows * columns)
    values: Tensor = operators.dequantize_4bit.default(data, absmax, blocksize, quant_type, shape, narrow)
    return values.view(rows, columns).to(dtype)


def _four_bit_codes(parts: list[Tensor], spec: str, rows: int, columns: int) -> CodedParts | None:
    """For products, which take rows of codes in multiples of 32."""
    return four_bits.codes(parts, *_settings(spec)) if columns % 32 == 0 else None


class _EightBits:
    """``Int8Params``: int8 (N, K), and the largest magnitude of each row.

    The package quantises x as well, in evaluation, and keeps columns of x above ``threshold`` apart, the outliers. Here
    x is multiplied as it is, so that nothing of it is an outlier.
    """

    name = "bitsandbytes-8bit"
    package = "bitsandbytes"

    def knows(self, module: nn.Module) -> bool:
        return type(module).forward is _package().nn.Linear8bitLt.forward

    def stands_in(self, module: nn.Module) -> bool:
        return isinstance(module, _package().nn.Linear8bitLt)

    def recover(self, module: Any, weight: Any) -> nn.Parameter:
        kept = {name: getattr(weight, name, None) for name in ("CB", "SCB")}
        made: nn.Parameter = _package().nn.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False, **kept)
        return made

    def why_not(self, module: Any) -> str | None:
        weight = module._parameters["weight"]
        kind = type(module).__name__
        if module.state.has_fp16_weights:
            return (
                f"{kind} has has_fp16_weights=True: its weight trains, and is quantized at each call. Make the layer "
                "with has_fp16_weights=False."
            )
        if weight.is_meta or weight.dtype != torch.int8 or _scales_of(module, weight) is None:
            return (
                f"{kind} has a weight that is not quantized yet: bitsandbytes does that when the layer moves to a "
                "device. Load its weights and call .to(device) first."
            )
        if tuple(weight.shape) != (module.out_features, module.in_features):
            return f"{kind} has an int8 weight of shape {tuple(weight.shape)}: it is a part. Gather the whole weight."
        return None

    def read(self, module: Any, weight: Any) -> Packed:
        scales = _scales_of(module, weight)
        if scales is None:
            raise LoRAStateError(
                "the int8 weight of a layer cannot be read: its scales (SCB) are gone. Assign the Int8Params that "
                "bitsandbytes made."
            )
        with torch._C.DisableTorchFunctionSubclass():
            parts = (weight.detach(), scales)
        return Packed(Layout(self.name, "", weight.shape[0], weight.shape[1], len(parts)), parts)

    def prepare(self, module: Any) -> None:
        """Has the module hold the scales too: what FSDP2 gathers of the weight has none."""
        module.state.SCB = _scales_of(module, module._parameters["weight"])

    def quantize(self, module: Any, weight: Any, values: Tensor) -> nn.Parameter:
        data, scales, _ = _package().functional.int8_vectorwise_quant(values.half())  # as the package's own Parameter
        kept = {"CB": data, "SCB": scales}
        made: nn.Parameter = _package().nn.Int8Params(data, requires_grad=False, has_fp16_weights=False, **kept)
        return made

    def settle(self, module: Any) -> None:
        module.state = copy.copy(module.state)  # a call of the package's layer writes to it

    def load(self, module: Any, weight: Any, state_dict: Mapping[str, Any], prefix: str) -> set[str]:
        key = f"{prefix}SCB"
        if key not in state_dict:
            return set()
        scales = _scales_of(module, weight)
        assert scales is not None
        scales.copy_(state_dict[key])
        return {key, f"{prefix}weight_format"} & set(state_dict)


def _scales_of(module: Any, weight: Any) -> Tensor | None:
    """The scales: the weight's, until the package's own forward has moved them into the module's state."""
    own = getattr(weight, "SCB", None)
    scales: Tensor | None = own if own is not None else module.state.SCB
    return scales


def _eight_bit_values(parts: list[Tensor], spec: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    found = eight_bits.values(_eight_bit_codes(parts, spec, rows, columns), rows, columns, dtype)
    return parts[0].to(dtype, copy=True).mul_(_scales(parts).unsqueeze(1)) if found is None else found


def _eight_bit_codes(parts: list[Tensor], spec: str, rows: int, columns: int) -> CodedParts | None:
    return eight_bits.codes(parts[0], _scales(parts), 1, columns)


def _scales(parts: list[Tensor]) -> Tensor:
    return parts[1].mul(1.0 / 127.0)


def _four_bits_stored(layout: Layout) -> Codes | None:
    quant_type, blocksize, nested, order = layout.spec.split("/")
    return None if order else Codes(quant_type, 1, int(blocksize), int(nested))


def _eight_bits_stored(layout: Layout) -> Codes:
    return Codes("int8", 1, 0, per=127)


FOUR_BITS, EIGHT_BITS = _FourBits(), _EightBits()
enter(FOUR_BITS.name, _four_bit_values, _four_bits_stored, _four_bit_codes)
enter(EIGHT_BITS.name, _eight_bit_values, _eight_bits_stored, _eight_bit_codes)
