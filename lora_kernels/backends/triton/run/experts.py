"""How a mixture's experts run: grids, strides and memory of their kernels, made ready once for each call's sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..choose.blocks import Machine, next_power_of_2
from ..choose.experts import Experts, experts_outer_config, experts_shrink_config, product_config
from ..kernels.experts import experts_outer_kernel, experts_product_kernel, experts_shrink_kernel
from .call import cdiv
from .prepared import Launch
from .steps import Step

__all__ = ["ExpertsCall", "backward_step", "forward_step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsCall:
    """All that a run depends on. Strides are the tensors' own; ``stride_w`` is None where no dx is due."""

    machine: Machine
    device: torch.device
    of: Experts
    precision: str
    k: int
    n: int
    stride_x: tuple[int, ...]
    stride_w: tuple[int, ...] | None
    stride_a: tuple[int, ...]
    stride_b: tuple[int, ...]
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    keep_scale: float

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def forward_step(c: ExpertsCall) -> Step:
    """``step(stream, x, weight, lora_a, lora_b, offsets, tokens, scaling, words)`` -> y, h."""
    of = c.of
    shrink = _shrink(c, c.k, c.stride_x, c.stride_a)
    assert c.stride_w is not None
    product = _product(c, c.k, c.n, c.stride_x, c.stride_w, c.stride_b, False)

    def step(
        stream: int | None,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        offsets: Tensor,
        tokens: Tensor | None,
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        h = c.empty(of.rows, of.r)
        y = c.empty(of.rows, c.n, dtype=of.dtype)
        shrink(stream, x, tokens, offsets, lora_a, words, h, c.keep_scale)
        product(stream, x, tokens, offsets, weight, h, lora_b, None, y, scaling)
        return y, h

    return step


def backward_step(c: ExpertsCall, stride_dy: tuple[int, ...], due: tuple[bool, bool, bool]) -> Step:
    """``step(stream, dy, x, weight, lora_a, lora_b, offsets, tokens, h, scaling, words)`` -> dx, da, db, dh.

    None for what is not ``due`` of dx, da, db.
    """
    of = c.of
    due_dx, due_da, due_db = due
    with_dh = due_dx or due_da
    shrink = _shrink(c, c.n, stride_dy, _turned(c.stride_b))
    product = None
    if c.stride_w is not None:
        product = _product(c, c.n, c.k, stride_dy, _turned(c.stride_w), _turned(c.stride_a), of.dropout)
    of_x = _outer(c, c.k, c.stride_x, (c.k, 1))
    of_dy = _outer(c, c.n, stride_dy, (1, of.r))

    def step(
        stream: int | None,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        offsets: Tensor,
        tokens: Tensor | None,
        h: Tensor | None,
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        dx = c.empty(of.rows, c.k, dtype=of.dtype) if due_dx else None
        da = c.empty(of.experts, of.r, c.k, dtype=c.a_dtype) if due_da else None
        db = c.empty(of.experts, c.n, of.r, dtype=c.b_dtype) if due_db else None
        dh = c.empty(of.rows, of.r) if with_dh else None
        if with_dh:
            shrink(stream, dy, None, offsets, lora_b, None, dh, scaling)
        if due_da:
            of_x(stream, dh, x, tokens, offsets, words, da, c.keep_scale)
        if due_db:
            of_dy(stream, h, dy, None, offsets, None, db, scaling)
        if product is not None:
            product(stream, dy, None, offsets, weight, dh, lora_a, words, dx, c.keep_scale)
        return dx, da, db, dh

    return step


def _turned(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Of the experts' transposed matrices."""
    return strides[0], strides[2], strides[1]


def _tiles(of: Experts, block_m: int) -> int:
    """As ``kernels.experts`` has them: enough for every routing."""
    return of.rows // block_m + of.experts + 1


def _shrink(c: ExpertsCall, columns: int, stride_x: tuple[int, ...], stride_a: tuple[int, ...]) -> Launch:
    """``launch(stream, x, tokens, offsets, a, words, h, scale)``."""
    of, config = c.of, experts_shrink_config(c.machine, c.of)
    tile = (config.block_m, config.block_k, config.block_r, next_power_of_2(of.experts), columns % config.block_k == 0)
    return Launch(
        experts_shrink_kernel,
        (_tiles(of, config.block_m), cdiv(of.r, config.block_r), 1),
        (of.rows, of.experts, columns, of.r, *stride_x, *stride_a, *tile, c.precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _product(
    c: ExpertsCall,
    depth: int,
    columns: int,
    stride_x: tuple[int, ...],
    stride_w: tuple[int, ...],
    stride_b: tuple[int, ...],
    masked: bool,
) -> Launch:
    """``launch(stream, x, tokens, offsets, weight, h, b, words, y, scaling)``."""
    of = replace(c.of, dropout=masked)
    gemm = product_config(c.machine, of, columns)
    block_m, block_n, block_k = gemm.block_rows, gemm.block_columns, gemm.block_sum
    tiles = _tiles(of, block_m)
    sizes = (of.rows, tiles, of.experts, columns, depth, of.r)
    tile = (block_m, block_n, block_k, gemm.block_r, next_power_of_2(of.experts), gemm.group_m)
    how = (depth % block_k == 0, of.dtype.itemsize == 2, c.precision)
    return Launch(
        experts_product_kernel,
        (tiles * cdiv(columns, block_n), 1, 1),
        (*sizes, *stride_x, *stride_w, *stride_b, *tile, *how),
        num_warps=gemm.num_warps,
        num_stages=gemm.num_stages,
    )


def _outer(c: ExpertsCall, columns: int, stride_x: tuple[int, ...], strides: tuple[int, int]) -> Launch:
    """``launch(stream, left, x, tokens, offsets, words, out, scale)``; ``strides`` are of out's rank and column."""
    of, config = c.of, experts_outer_config(c.machine, c.of, columns)
    tile = (config.block_m, config.block_k, config.block_r, of.dtype.itemsize == 2, c.precision)
    return Launch(
        experts_outer_kernel,
        (cdiv(columns, config.block_k), of.experts, cdiv(of.r, config.block_r)),
        (columns, of.r, *stride_x, *strides, *tile),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
