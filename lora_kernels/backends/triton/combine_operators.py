"""``combine`` and ``combine_grad`` of ``ops.py`` on top of the kernels: one launch each, none of empty tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .choose import blocks
from .choose.combine import combine_block, combine_grad_block
from .kernels.combine import combine_grad_kernel, combine_kernel
from .run.call import cdiv
from .run.launcher import PassRun
from .run.prepared import Cache, Launch, alignment, matrix
from .run.steps import Step

__all__ = ["combine", "combine_grad", "forget"]

_runs: Cache[PassRun] = Cache()


def forget() -> None:
    """Forget what was made ready."""
    _runs.clear()


def combine(
    rows: Tensor, weights: Tensor | None, places: Tensor, offsets: Tensor, k: int, dtype: torch.dtype
) -> Tensor:
    places = places.contiguous()
    if 0 in rows.shape:
        return rows.new_zeros((places.shape[0] // k, rows.shape[1]), dtype=dtype)
    of_weights = None if weights is None else matrix(weights)
    aligned = alignment(rows, weights, places, offsets)
    key = ("combine", *matrix(rows), of_weights, offsets.shape, k, dtype, aligned)
    run = _runs.get(key)
    if run is None:
        run = _runs.keep(key, PassRun(_combine_step(rows, weights, offsets.shape[0], k, dtype), rows.device))
    y: Tensor = run(rows, weights, places, offsets)
    return y


def _combine_step(rows: Tensor, weights: Tensor | None, experts: int, k: int, dtype: torch.dtype) -> Step:
    """``step(stream, rows, weights, places, offsets)`` -> y."""
    (m, columns), device = rows.shape, rows.device
    shape = m // k, columns
    block_k, block_h, num_warps = combine_block(blocks.machine_of(device), columns, k, rows.itemsize)
    strides = (*rows.stride(), *((0, 0) if weights is None else weights.stride()))
    grid = shape[0], cdiv(columns, block_h), 1
    launch = Launch(combine_kernel, grid, (experts, columns, *strides, k, block_k, block_h), num_warps=num_warps)

    def step(stream: int | None, rows: Tensor, weights: Tensor | None, places: Tensor, offsets: Tensor) -> Tensor:
        y = torch.empty(shape, dtype=dtype, device=device)
        launch(stream, rows, weights, places, offsets, y)
        return y

    return step


def combine_grad(
    dy: Tensor, rows: Tensor | None, weights: Tensor, places: Tensor, offsets: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    places = places.contiguous()
    m, columns = places.shape[0], dy.shape[1]
    if 0 in (m, columns) or (rows is None and dtype is None):
        return (
            dy.new_zeros(0 if dtype is None else (m, columns), dtype=dtype),
            weights.new_zeros(0 if rows is None else weights.shape),
        )
    of_rows = None if rows is None else matrix(rows)
    aligned = alignment(dy, rows, weights, places, offsets)
    key = ("combine_grad", *matrix(dy), of_rows, *matrix(weights), offsets.shape, dtype, aligned)
    run = _runs.get(key)
    if run is None:
        step = _combine_grad_step(dy, rows, weights, offsets.shape[0], dtype)
        with torch.inference_mode(False):
            absent = tuple(torch.empty(0, dtype=own.dtype, device=own.device) for own in (dy, weights))
        run = _runs.keep(key, PassRun(step, dy.device, absent))
    d_rows, d_weights = run(dy, rows, weights, places, offsets)
    return d_rows, d_weights


def _combine_grad_step(
    dy: Tensor, rows: Tensor | None, weights: Tensor, experts: int, dtype: torch.dtype | None
) -> Step:
    """``step(stream, dy, rows, weights, places, offsets)`` -> d_rows and d_weights, None for what is not due."""
    (tokens, columns), k, device = dy.shape, weights.shape[1], dy.device
    m, of_weights, due_weights = tokens * k, weights.dtype, rows is not None
    itemsize = (dy if rows is None else rows).itemsize
    block_s, block_h, num_warps = combine_grad_block(blocks.machine_of(device), columns, itemsize)
    strides = (*dy.stride(), *((0, 0) if rows is None else rows.stride()), *weights.stride())
    launch = Launch(
        combine_grad_kernel,
        (cdiv(m, block_s), 1, 1),
        (m, experts, columns, *strides, k, block_s, block_h),
        num_warps=num_warps,
    )

    def step(
        stream: int | None, dy: Tensor, rows: Tensor | None, weights: Tensor, places: Tensor, offsets: Tensor
    ) -> tuple[Tensor | None, ...]:
        d_rows = None if dtype is None else torch.empty((m, columns), dtype=dtype, device=device)
        d_weights = torch.empty((tokens, k), dtype=of_weights, device=device) if due_weights else None
        launch(stream, dy, rows, weights, places, offsets, d_rows, d_weights)
        return d_rows, d_weights

    return step
