"""The operators of a mixture's stacked experts by a loop over those that have rows: on every device, in every dtype.

The adapter's product is added onto the base's while that is in the cache. Over fp16 what the adapters take part in is
in fp32 (``reference.adapter_dtype``), an expert's rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import adapter_dtype
from ..tensors import as_dtype

__all__ = ["operators"]


class _Drop(NamedTuple):
    """Dropout's mask of the sorted rows, bool (M, K), and 1 / (1 - p)."""

    mask: Tensor
    scale: float

    def of(self, x: Tensor, rows: slice) -> Tensor:
        """What is kept of x's rows, not scaled yet."""
        return x * self.mask[rows]


def operators(mask: Callable[..., Tensor]) -> dict[str, Callable[..., Any]]:
    """``experts_forward`` and ``experts_backward`` (``ops.py``) of a backend whose ``mask`` this is."""
    return {"experts_forward": partial(forward, mask), "experts_backward": partial(backward, mask)}


def forward(
    draw: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    offsets: Tensor,
    tokens: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    m, wide = (x if tokens is None else tokens).shape[0], adapter_dtype(x.dtype)
    parts, end = _parts(offsets)
    y = x.new_empty((m, weight.shape[1]))
    h = x.new_empty((0,) if lora_a is None else (m, lora_a.shape[1]), dtype=wide)
    drop = None if state is None else _Drop(draw(state, m, weight.shape[2], p), 1.0 / (1.0 - p))
    for e, rows in parts:
        own = _rows(x, tokens, rows)
        torch.mm(own, as_dtype(weight[e], x.dtype).t(), out=y[rows])
        if lora_a is None or lora_b is None:
            continue
        a, b = as_dtype(lora_a[e], wide), as_dtype(lora_b[e], wide)
        _product_into(h[rows], _dropped(own, rows, drop, wide), a.t(), _scale(drop))
        _add_product(y[rows], h[rows], b.t(), scaling)
    for result in (y, h):
        result[end:] = 0.0
    return y, h


def backward(
    draw: Callable[..., Tensor],
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    offsets: Tensor,
    tokens: Tensor | None,
    h: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    m, wide = dy.shape[0], adapter_dtype(dy.dtype)
    parts, end = _parts(offsets)
    dx = dy.new_empty(0 if weight is None else (m, weight.shape[2]))
    da, db = _zeros_if(x is not None, lora_a, dy), _zeros_if(h is not None, lora_b, dy)
    drop = None
    if state is not None and lora_a is not None:
        drop = _Drop(draw(state, m, lora_a.shape[2], p), 1.0 / (1.0 - p))
    for e, rows in parts:
        outer = dy[rows]
        if weight is not None:
            torch.mm(outer, as_dtype(weight[e], dy.dtype), out=dx[rows])
        if lora_a is None or lora_b is None:
            continue
        wide_dy = as_dtype(outer, wide)
        dh = _product(wide_dy, as_dtype(lora_b[e], wide), scaling)
        if weight is not None:
            a = as_dtype(lora_a[e], wide)
            if drop is None:
                _add_product(dx[rows], dh, a, 1.0)
            else:
                dx[rows].add_(drop.of(_product(dh, a, drop.scale), rows))
        if x is not None:
            da[e] = _product(dh.t(), _dropped(_rows(x, tokens, rows), rows, drop, wide), _scale(drop))
        if h is not None:
            db[e] = _product(h[rows].t(), wide_dy, scaling).t()  # the quicker order of the product
    if weight is not None:
        dx[end:] = 0.0
    return dx, da, db


def _parts(offsets: Tensor) -> tuple[list[tuple[int, slice]], int]:
    """``(expert, its rows)`` of each expert that has any, and where the last one's end; waits for a GPU."""
    ends: list[int] = offsets.tolist()
    starts = [0, *ends[:-1]]
    return [(e, slice(s, t)) for e, (s, t) in enumerate(zip(starts, ends, strict=True)) if t > s], ends[-1]


def _rows(x: Tensor, tokens: Tensor | None, rows: slice) -> Tensor:
    return x[rows] if tokens is None else x.index_select(0, tokens[rows])


def _zeros_if(due: bool, like: Tensor | None, other: Tensor) -> Tensor:
    if like is None:
        return other.new_empty(0)
    return torch.zeros_like(like, memory_format=torch.contiguous_format) if due else like.new_empty(0)


def _scale(drop: _Drop | None) -> float:
    return 1.0 if drop is None else drop.scale


def _dropped(x: Tensor, rows: slice, drop: _Drop | None, wide: torch.dtype) -> Tensor:
    x = as_dtype(x, wide)
    return x if drop is None else drop.of(x, rows)


def _product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


def _product_into(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """out = scaling * left right; with beta = 0 what ``out`` holds is not read."""
    torch.addmm(out, left, right, beta=0, alpha=scaling, out=out)


def _add_product(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """out += scaling * left right, in the wider of their dtypes."""
    if out.dtype is left.dtype:
        torch.addmm(out, left, right, alpha=scaling, out=out)
    else:
        out.add_(left @ right, alpha=scaling)
