"""Weights of 4-bit codes on CPUs: their values by the kernels in C++, and what these read of them.

A code is one of 16 numbers, a block of values shares one factor, ``absmax``, which may itself be quantised ("nested").
The values are bit for bit those that the package makes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import ops

__all__ = ["TABLES", "codes", "e2m1", "mx_codes", "values"]

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
_E2M1 = tuple(sign * number for sign in (1.0, -1.0) for number in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_UNIT = 32  # codes: a block is a multiple of it


@lru_cache(maxsize=8)
def _table(quant_type: str) -> Tensor:
    numbers = _E2M1 if quant_type == "e2m1" else TABLES[quant_type]
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")  # whatever torch.device says now


@lru_cache(maxsize=16)
def _pairs(device: torch.device) -> Tensor:
    """The two e2m1 numbers of each byte, as one number of 64 bits."""
    table = torch.tensor(_E2M1, device="cpu")
    return torch.stack((table.repeat(16), table.repeat_interleave(16)), 1).view(torch.int64).flatten().to(device)


def e2m1(data: Tensor) -> Tensor:
    """The fp32 numbers of e2m1 codes, in one row: of each byte's two the lower half's first. On any device."""
    return _pairs(data.device).index_select(0, data.view(torch.uint8).flatten().int()).view(torch.float32)


def values(
    parts: list[Tensor],
    quant_type: str,
    blocksize: int,
    nested: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    by_columns: bool = False,
) -> Tensor | None:
    """W (rows, columns) in ``dtype``; None where the kernels are not there or do not read such a weight.

    Args:
        parts: the codes, two a byte in row order, and fp32 absmax; where ``nested`` blocks of it are quantised, the
            8-bit absmax, and its own absmax, table and offset.
        nested: how many of absmax make a block, or 0.
        by_columns: whether they are in bitsandbytes' order for AVX512-BF16, absmax in bf16; C++ alone reads that.
    """
    if dtype not in _DTYPES:
        return None
    read = codes(parts, quant_type, blocksize, nested, by_columns)
    return None if read is None or not ops.has_coded_kernels() else ops.coded_values(read, rows, columns, dtype)


def codes(
    parts: list[Tensor], quant_type: str, blocksize: int, nested: int, by_columns: bool = False
) -> ops.CodedParts | None:
    """What the C++ library reads of the ``parts`` that :func:`values` takes; None where it reads no such weight."""
    if not parts[0].is_cpu or not _fit(parts, blocksize, by_columns):
        return None
    return ops.CodedParts(_as_bytes(parts), _table(quant_type), 1, blocksize, nested)


def mx_codes(data: Tensor, scales: Tensor, blocksize: int) -> ops.CodedParts | None:
    """The same of MXFP4: two e2m1 numbers a byte, the first in its lower half, and a power of two of each block.

    Args:
        data: the codes, of any dtype of a byte.
        scales: e8m0, the exponent plus 127; 255 is no number.
    """
    if not data.is_cpu or data.element_size() != 1 or scales.element_size() != 1:
        return None
    parts = [data.view(torch.uint8), scales.view(torch.float8_e8m0fnu).float()]
    return ops.CodedParts(parts, _table("e2m1"), 1, blocksize, 0, True) if _fit(parts, blocksize, False) else None


def _fit(parts: list[Tensor], blocksize: int, by_columns: bool) -> bool:
    """Whether the kernels read such parts: whole tensors in one place, of the dtypes that the package makes."""
    if blocksize % _UNIT != 0:
        return False
    wanted, device = torch.uint8 if len(parts) > 2 else torch.bfloat16 if by_columns else torch.float32, parts[0].device
    for i, part in enumerate(parts):
        if type(part) is not Tensor or part.device != device or not part.is_contiguous():
            return False
        if i > 0 and part.dtype is not (wanted if i == 1 else torch.float32):
            return False
    return True


def _as_bytes(parts: list[Tensor]) -> list[Tensor]:
    """The parts; codes that are stored in another dtype (``quant_storage``) as the bytes that they are."""
    stored = parts[0]
    return parts if stored.dtype is torch.uint8 else [stored.view(torch.uint8), *parts[1:]]
