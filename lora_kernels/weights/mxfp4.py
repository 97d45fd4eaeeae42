"""MXFP4 of transformers' gpt-oss: codes of 4 bits, and a power of two for each 32 of them.

``Mxfp4GptOssExperts`` holds a weight as an object of its Triton kernels', in a layout of the device's. That is undone
as transformers does it to save such a model, and gives the published one: blocks (E, N, K / 32, 16), the first of two
codes in the lower bits, and scales (E, N, K / 32), the exponent plus 127.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import ops
from ..codes import Codes
from ..errors import LoRAStateError
from ..ops import CodedParts
from . import four_bits
from .by_codes import enter
from .packed import Layout

__all__ = ["codes", "is_experts", "names", "read", "values"]

_KIND = ("transformers.integrations.mxfp4", "Mxfp4GptOssExperts")
_NAMES = ("gate_up_proj", "down_proj")
_BIAS = 127
_BLOCK = 32
_OF_KERNELS = (torch.float32, torch.bfloat16, torch.float16)
_FOUND: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def is_experts(kind: Any) -> bool:
    """Whether a class is, or derives from, transformers' experts in MXFP4."""
    found = _FOUND.get(kind)
    if found is None:
        found = any((each.__module__, each.__qualname__) == _KIND for each in kind.__mro__)
        _FOUND[kind] = found
    return found


is_experts._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a class is asked once, and no graph asks


def names(module: nn.Module) -> tuple[str, ...]:
    """The names of the quantised weights of such a module; of another one nothing."""
    return _NAMES if is_experts(type(module)) else ()


def read(module: Any, name: str) -> tuple[Layout, tuple[Tensor, ...], tuple[int, ...], int]:
    """The layout of one expert, blocks and scales of all, how many rows of each an expert has, and E."""
    weight, precision = getattr(module, name), getattr(module, f"{name}_precision_config")
    if precision is None or not hasattr(weight, "storage") or isinstance(weight, Tensor):
        raise LoRAStateError(
            f"{type(module).__name__}.{name} has no scales yet: transformers puts them there when the weights are "
            "loaded. Load the model with from_pretrained first."
        )
    scales = _unswizzled(precision.weight_scale).contiguous()
    blocks = _unswizzled(weight).contiguous()
    experts, n, groups = scales.shape
    if blocks.numel() != scales.numel() * _BLOCK // 2:
        raise LoRAStateError(
            f"{type(module).__name__}.{name} has MXFP4 codes {tuple(blocks.shape)} for scales {tuple(scales.shape)}: "
            "32 numbers must share one. Load the model with transformers' own version of these kernels."
        )
    parts = (blocks.view(torch.uint8).view(experts * n, groups, _BLOCK // 2), scales.view(experts * n, groups))
    return Layout("mxfp4", "", n, groups * _BLOCK, len(parts)), parts, (n, n), experts


def _unswizzled(held: Any) -> Tensor:
    storage = held.storage
    found: Tensor = storage.layout.unswizzle_data(storage.data)
    return found.transpose(-1, -2)


def codes(parts: list[Tensor], spec: str, rows: int, columns: int) -> CodedParts | None:
    """What the C++ library for CPUs reads of the same."""
    return four_bits.mx_codes(parts[0], parts[1], _BLOCK)


def values(parts: list[Tensor], spec: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """W (rows, columns) in ``dtype``; exact where that holds the exponent."""
    blocks, scales = parts
    read = codes(parts, spec, rows, columns)
    if read is not None and dtype in _OF_KERNELS and ops.has_coded_kernels():
        return ops.coded_values(read, rows, columns, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    found = four_bits.e2m1(blocks).view(rows, -1, _BLOCK).to(wide)
    return torch.ldexp(found, scales.int().sub_(_BIAS).unsqueeze(-1)).view(rows, columns).to(dtype)


def _stored(layout: Layout) -> Codes:
    return Codes("e2m1", 1, _BLOCK, scales="e8m0")


enter("mxfp4", values, _stored, codes)
