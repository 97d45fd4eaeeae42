"""The same products by ``torch.nn.functional.grouped_mm``: where it reads the offsets on the device, nothing waits.

That is bf16 on GPUs from compute capability 8.0 on. Elsewhere it loops over the experts itself, one pass over y more
than ``eager`` takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grouped_mm import runs
from ..tensors import as_dtype
from .problem import Adapter, Drop, Gradients

__all__ = ["backward", "forward", "runs"]

_ALIGNED = 16  # bytes that rows must lie apart


def forward(
    x: Tensor, weight: Tensor, adapter: Adapter | None, drop: Drop | None, offsets: Tensor, present: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """As ``experts_forward`` of ``ops.py``; h has its rank filled up with zeros to what the alignment asks for."""
    y = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    h = None
    if adapter is not None:
        a, b = _filled_up(adapter, x.dtype)
        h = F.grouped_mm(_dropped(x, drop), a.transpose(1, 2), offs=offsets)
        y.add_(F.grouped_mm(h, b.transpose(1, 2), offs=offsets), alpha=adapter.scaling * _scale(drop))
    return _without_sentinels(y, present), h


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter | None,
    h: Tensor | None,
    drop: Drop | None,
    offsets: Tensor,
    present: Tensor | None,
) -> Gradients:
    """dx where ``weight`` is there, da where ``x`` is, db where ``h`` is."""
    dx = None if weight is None else F.grouped_mm(dy, weight, offs=offsets)
    if adapter is None:
        return Gradients(None if dx is None else _without_sentinels(dx, present), None, None)
    a, b = _filled_up(adapter, dy.dtype)
    scaling = adapter.scaling * _scale(drop)
    dh = F.grouped_mm(dy, b, offs=offsets)  # of s = 1
    da = db = None
    if dx is not None:
        low_rank = F.grouped_mm(dh, a, offs=offsets)
        dx.add_(low_rank if drop is None else low_rank.mul_(drop.mask), alpha=scaling)
        dx = _without_sentinels(dx, present)
    if x is not None:
        da = _of_experts(F.grouped_mm(dh.t(), _dropped(x, drop), offs=offsets)[:, : adapter.r], scaling, offsets)
    if h is not None:
        db = _of_experts(F.grouped_mm(dy.t(), h, offs=offsets)[..., : adapter.r], scaling, offsets)
    return Gradients(
        dx, None if da is None else as_dtype(da, adapter.a.dtype), None if db is None else as_dtype(db, adapter.b.dtype)
    )


def _filled_up(adapter: Adapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = as_dtype(adapter.a, dtype), as_dtype(adapter.b, dtype)
    if missing := -adapter.r % (_ALIGNED // a.element_size()):
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return a, b


def _scale(drop: Drop | None) -> float:
    return 1.0 if drop is None else drop.scale


def _dropped(x: Tensor, drop: Drop | None) -> Tensor:
    return x if drop is None else x * drop.mask


def _without_sentinels(rows: Tensor, present: Tensor | None) -> Tensor:
    """Zero where ``grouped_mm`` wrote nothing."""
    return rows if present is None else rows.masked_fill_(~present, 0.0)


def _of_experts(gradient: Tensor, scaling: float, offsets: Tensor) -> Tensor:
    """Scaled, and zero for experts without a token, of which the product is not promised."""
    empty = torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0
    return (gradient * scaling).masked_fill_(empty.view(-1, 1, 1), 0.0)
