"""transformers' block-scaled FP8 (``FP8Linear``): e4m3 numbers, and an inverse scale of each block, often 128x128.

The values are those of transformers' own conversion to 16 bits: the product in fp32, rounded once. Its layer quantises
x as well, and runs on GPUs only; here x is multiplied as it is.

The layer's weight is a plain Parameter, whose scales another Parameter of the module holds. A LoRA layer marks it by a
class of its own, so that nobody takes it for its values; ``settle`` takes the mark away.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codes import Codes
from ..errors import LoRAStateError
from ..ops import CodedParts
from . import eight_bits
from .by_codes import enter
from .packed import Layout, Packed

__all__ = ["BLOCK_FP8", "BlockScaled"]

_FP8 = torch.float8_e4m3fn
_WHOLE = "whole"  # one scale of the whole weight
_PART = 1 << 22  # how many fp32 numbers are made at a time


class BlockScaled(nn.Parameter):
    """An FP8 weight of a LoRA layer; a merged one has scales of its own."""

    scale: Tensor | None = None


class _BlockFp8:
    name = "transformers-fp8"
    package = "transformers"

    def knows(self, module: nn.Module) -> bool:
        return type(module).forward is _linear().forward

    def stands_in(self, module: nn.Module) -> bool:
        return (kind := _linear()) is not None and isinstance(module, kind)

    def recover(self, module: Any, weight: Any) -> nn.Parameter:
        return BlockScaled(weight.data, requires_grad=False)

    def why_not(self, module: Any) -> str | None:
        weight, kind = module._parameters["weight"], type(module).__name__
        if weight.is_meta:
            return f"{kind} is on the meta device. Load its weights first."
        if weight.dtype.itemsize > 1 and module._parameters.get("weight_scale_inv") is not None:
            raise _converted(weight.dtype)
        if weight.dtype is not _FP8:
            return (
                f"{kind} has a weight in {weight.dtype}: only FP8 in the form {_FP8} is known here. Load the model "
                "with dequantize=True, or keep these layers as they are."
            )
        if tuple(weight.shape) != (module.out_features, module.in_features):
            return (
                f"{kind} has a weight of shape {tuple(weight.shape)} where ({module.out_features}, "
                f"{module.in_features}) is expected: it is a part. Gather the whole weight."
            )
        expected, scale = _grid(module), module._parameters["weight_scale_inv"]
        if scale.numel() != 1 if module.block_size is None else tuple(scale.shape) != expected:
            return (
                f"{kind} has scales of shape {tuple(scale.shape)} where {expected} is expected for blocks of "
                f"{module.block_size}. Load weight and scales of the same checkpoint."
            )
        return None

    def read(self, module: Any, weight: Any) -> Packed:
        if weight.dtype is not _FP8:
            raise _converted(weight.dtype)
        scale = getattr(weight, "scale", None)
        own = module._parameters["weight_scale_inv"] if scale is None else scale
        parts = (weight.detach(), own.detach())
        size = module.block_size
        spec = _WHOLE if size is None else f"{size[0]}/{size[1]}"
        return Packed(Layout(self.name, spec, weight.shape[0], weight.shape[1], len(parts)), parts)

    def prepare(self, module: Any) -> None:
        own = module._parameters
        own["weight"] = BlockScaled(own["weight"].data, requires_grad=False)
        for name in ("weight_scale_inv", "activation_scale"):
            if own.get(name) is not None:
                own[name].requires_grad_(False)

    def quantize(self, module: Any, weight: Any, values: Tensor) -> nn.Parameter:
        scale = module._parameters["weight_scale_inv"]
        high, wide = module.block_size or values.shape
        rows, columns = values.shape
        padded = F.pad(values, (0, -columns % wide, 0, -rows % high))
        blocks = padded.view(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
        own = blocks.abs().amax((1, 3)).div_(torch.finfo(_FP8).max)
        own = torch.where(own > 0, own, 1.0)
        if scale.dtype.itemsize == 1:  # powers of two
            own = torch.exp2(torch.ceil(torch.log2(own)))
        data = (blocks / own[:, None, :, None]).view(padded.shape)[:rows, :columns].to(_FP8)
        made = BlockScaled(data.contiguous(), requires_grad=False)
        made.scale = own.to(scale.dtype).reshape(scale.shape)
        return made

    def settle(self, module: Any) -> None:
        weight = module._parameters["weight"]
        if getattr(weight, "scale", None) is not None:
            module._parameters["weight_scale_inv"] = nn.Parameter(weight.scale, requires_grad=False)
        module._parameters["weight"] = nn.Parameter(weight.data, requires_grad=False)

    def load(self, module: Any, weight: Any, state_dict: Mapping[str, Any], prefix: str) -> set[str]:
        return set()  # the scales are a Parameter, and are loaded as one


def _linear() -> Any:
    return getattr(sys.modules.get("transformers.integrations.finegrained_fp8"), "FP8Linear", None)


def _converted(dtype: torch.dtype) -> LoRAStateError:
    """What is told of numbers that were converted beside their scales."""
    return LoRAStateError(
        f"an FP8 weight was converted to {dtype} without its scales, so its values are lost. Load the model again, and "
        "convert only its other Parameters; adapter_dtype sets that of the adapters."
    )


def _grid(module: Any) -> tuple[int, ...]:
    """The shape of the scales."""
    if module.block_size is None:
        return ()
    (rows, columns), size = (module.out_features, module.in_features), module.block_size
    return -(-rows // size[0]), -(-columns // size[1])


def _block(spec: str, rows: int, columns: int) -> tuple[int, int]:
    if spec == _WHOLE:
        return rows, columns
    high, wide = spec.split("/")
    return int(high), int(wide)


def _codes(parts: list[Tensor], spec: str, rows: int, columns: int) -> CodedParts | None:
    return eight_bits.codes(parts[0], parts[1], *_block(spec, rows, columns))


def _values(parts: list[Tensor], spec: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if (found := eight_bits.values(_codes(parts, spec, rows, columns), rows, columns, dtype)) is not None:
        return found
    data, scale = parts[0], parts[1].float()
    high, wide = _block(spec, rows, columns)
    scale = scale.reshape(-(-rows // high), -(-columns // wide)).repeat_interleave(wide, 1)[:, :columns]
    values = torch.empty((rows, columns), dtype=dtype, device=data.device)
    step = high * max(1, _PART // (high * columns))
    for start in range(0, rows, step):
        end = min(rows, start + step)
        own = scale[start // high : -(-end // high)].repeat_interleave(high, 0)[: end - start]
        values[start:end] = own.mul_(data[start:end].float())
    return values


def _stored(layout: Layout) -> Codes:
    high, wide = (0, 0) if layout.spec == _WHOLE else map(int, layout.spec.split("/"))
    return Codes("e4m3", high, wide)


BLOCK_FP8 = _BlockFp8()
enter(BLOCK_FP8.name, _values, _stored, _codes)
