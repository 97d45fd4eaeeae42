"""Weights of 4-bit codes: their values by the kernels in C++ or Triton; on CPUs, few tokens' product with the codes.

A code is one of 16 numbers, a block of values shares one factor, ``absmax``, which may itself be quantised ("nested").
The values are bit for bit those that the package makes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import ops
from .packed import Layout

__all__ = ["TABLES", "product", "values"]

TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(
        0.0 + sign * number / 12 for sign in (1, -1) for number in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_UNIT = 32  # codes: a block is a multiple of it, and so is a row of a product
_FEW_TOKENS = 16


@lru_cache(maxsize=8)
def _table(quant_type: str) -> Tensor:
    return torch.tensor(TABLES[quant_type], dtype=torch.float32)


def values(
    parts: list[Tensor], quant_type: str, blocksize: int, nested: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor | None:
    """W (rows, columns) in ``dtype``; None where the kernels are not there or do not read such a weight.

    Args:
        parts: the codes, two a byte in row order, and fp32 absmax; where ``nested`` blocks of it are quantised, the
            8-bit absmax, and its own absmax, table and offset.
        nested: how many of absmax make a block, or 0.
    """
    if dtype not in _DTYPES or not _fit(parts, blocksize):
        return None
    if (by_triton := ops.triton_four_bit_values(parts[0].device.type)) is not None:
        return by_triton(_as_bytes(parts), quant_type, blocksize, nested, rows, columns, dtype)
    if not _are_native(parts):
        return None
    return ops.four_bit_values(_as_bytes(parts), _table(quant_type), blocksize, nested, rows, columns, dtype)


def product(
    x: Tensor,
    layout: Layout | None,
    parts: tuple[Tensor, ...],
    lora_b: Tensor,
    h: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    scaling: float,
    with_linear: bool,
) -> tuple[Tensor, Tensor] | None:
    """What the ``native`` backend's ``product`` gives, in one pass over the codes; None: multiply by the values."""
    if layout is None or x.shape[0] > _FEW_TOKENS or x.dtype not in _DTYPES or layout.columns % _UNIT:
        return None
    if (read := _spec(layout)) is None:
        return None
    quant_type, blocksize, nested = read
    if not (_are_native(parts) and _fit(parts, blocksize)):
        return None
    return ops.four_bit_product(
        x, _as_bytes(parts), _table(quant_type), blocksize, nested, lora_b, h, bias, gain, scaling, with_linear
    )


@lru_cache(maxsize=64)
def _spec(layout: Layout) -> tuple[str, int, int] | None:
    """Quantisation type, blocksize and nested blocksize; None of another form or layout."""
    if layout.form != "bitsandbytes-4bit":
        return None
    quant_type, blocksize, nested, order = layout.spec.split("/")
    return None if order else (quant_type, int(blocksize), int(nested))


def _are_native(parts: list[Tensor] | tuple[Tensor, ...]) -> bool:
    return parts[0].device.type == "cpu" and ops.has_four_bit_kernels()


def _fit(parts: list[Tensor] | tuple[Tensor, ...], blocksize: int) -> bool:
    """Whether the kernels read such parts: whole tensors in one place, of the dtypes that the package makes."""
    nested = torch.uint8 if len(parts) > 2 else torch.float32
    return (
        blocksize % _UNIT == 0
        and parts[1].dtype is nested
        and all(part.dtype is torch.float32 for part in parts[2:])
        and all(type(part) is Tensor and part.device == parts[0].device and part.is_contiguous() for part in parts)
    )


def _as_bytes(parts: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """The parts; codes that are stored in another dtype (``quant_storage``) as the bytes that they are."""
    codes = parts[0]
    return list(parts) if codes.dtype is torch.uint8 else [codes.view(torch.uint8), *parts[1:]]
