"""Weights of 8-bit codes, int8 or e4m3, with a scale for each block: by the kernels in C++, where they read them.

A value is (code - zero) * scale in fp32, rounded once, as the packages make it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops

__all__ = ["codes", "values"]

_E4M3 = torch.float8_e4m3fn
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def codes(data: Tensor, scales: Tensor, high: int, wide: int, zeros: Tensor | None = None) -> ops.CodedParts | None:
    """What the C++ library reads of W (N, K); None where it reads no such weight.

    Args:
        data: int8 or e4m3 (N, K).
        scales, zeros: one of each block of ``high`` rows and ``wide`` columns, in the order of rows.
    """
    given = (data, scales) if zeros is None else (data, scales, zeros)
    if (
        data.device.type != "cpu"
        or data.dtype not in (torch.int8, _E4M3)
        or scales.numel() != -(-data.shape[0] // high) * -(-data.shape[1] // wide)
        or not all(type(part) is Tensor and part.is_contiguous() for part in given)
        or (zeros is not None and (zeros.dtype is not torch.int8 or data.dtype is _E4M3))
    ):
        return None
    parts = [data.view(torch.uint8) if data.dtype is _E4M3 else data, scales.float(), *given[2:]]
    return ops.CodedParts(parts, None, high, wide, 0)


def values(read: ops.CodedParts | None, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
    """W (rows, columns) in ``dtype``; None where the library is not there or does not read such a weight."""
    if read is None or dtype not in _DTYPES or not ops.has_coded_kernels():
        return None
    return ops.coded_values(read, rows, columns, dtype)
