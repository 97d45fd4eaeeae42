"""The Gluon kernels' host side for a group: 2 to 4 layers that read one x. The conventions are those of ``hopper``.

A group is the tuple of its members' ``HopperCall``, which differ in N and rank only. h_i and dh_i are the operands that
a layer by itself writes and reads, a contiguous tensor a member: so a group may run forward and its members backward,
or the other way round. One wide operand of all members would need the same scale for all of them, and the products
would load the columns of the others with their own.

Where ``choose.hopper_group_blocks`` has no configuration, the members' own steps of ``hopper`` run, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from ....kept import row_words
from ....reference import dropout_threshold
from ..choose.hopper_blocks import HopperDhDb, HopperProduct, chunk_of
from ..choose.hopper_group_blocks import MEMBERS, HopperGroupDa, HopperGroupDx, HopperGroupShrink
from ..kernels.hopper.group_dx import hopper_group_dx_kernel
from ..kernels.hopper.group_outer import hopper_group_da_kernel, hopper_group_dh_db_kernel
from ..kernels.hopper.group_product import hopper_group_product_kernel
from ..kernels.hopper.group_shrink import hopper_group_shrink_kernel
from ..kernels.hopper.group_small import (
    hopper_group_pack_kernel,
    hopper_group_reduce_dh_kernel,
    hopper_group_reduce_grads_kernel,
)
from . import hopper
from .call import cdiv
from .descriptors import descriptor
from .hopper import Step
from .hopper_call import HopperCall, call_fault
from .prepared import Launch

__all__ = [
    "Group",
    "GroupOperands",
    "group_da_step",
    "group_dh_db_step",
    "group_dx_step",
    "group_fault",
    "group_pack_step",
    "group_product_step",
    "group_reduce_grads_step",
    "group_shrink_counters",
    "group_shrink_step",
]

Group: TypeAlias = tuple[HopperCall, ...]
GroupOperands: TypeAlias = tuple[list[Tensor], list[Tensor], Tensor | None]  # of every A, of every B; counters
_T = TypeVar("_T")

_CONSUMER_REGISTERS = 240
_PACK_NUMBERS = 64 * 32
_new = hopper._new


def group_fault(group: Group) -> str | None:
    """The end of a sentence "the Gluon kernels do not run this group: ..." where they do not; tensors aside."""
    if len(group) not in MEMBERS:
        return f"it has {len(group)} members and they are for {MEMBERS[0]} to {MEMBERS[-1]}"
    first = group[0]
    for number, c in enumerate(group):
        for name, of in (("dtype", "dtype"), ("device", "device"), ("tokens", "m"), ("in_features", "k")):
            if getattr(c, of) != getattr(first, of):
                return f"member {number} has {name} {getattr(c, of)} and member 0 has {getattr(first, of)}"
        if (c.dropout, c.p) != (first.dropout, first.p):
            mine, its = (f"p = {one.p}" if one.dropout else "no dropout" for one in (c, first))
            return f"member {number} has {mine} and member 0 has {its}"
        if fault := call_fault(c):
            return f"of member {number}, {fault}"
    return None


def _four(values: Sequence[_T]) -> tuple[_T | None, ...]:
    """A number for each of the kernels' four places: None where there is no member."""
    return (*values, *[None] * (MEMBERS[-1] - len(values)))


def _ranks(group: Group) -> tuple[int, ...]:
    return tuple(c.operand.rank for c in group)


def _terms(group: Group) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Each member's columns of a low-rank step, h's steps, and the adapter's."""
    operands = [c.operand for c in group]
    return (
        tuple(o.step for o in operands),
        tuple(o.columns // o.step for o in operands),
        tuple(o.adapter_columns // o.step for o in operands),
    )


def group_pack_step(group: Group, counters: int = 0) -> Step:
    """``step(stream, lora_as, lora_bs)`` -> the operands of every A, of every B, and zeroed counters or None.

    A_i and B_i are contiguous, all A_i of one dtype, all B_i of one. Others: ``hopper.pack_step``, a member each.
    """
    c = group[0]
    operands = [one.operand for one in group]
    columns = tuple(o.adapter_columns for o in operands)
    block = min(64, _PACK_NUMBERS // max(columns))
    most = cdiv(c.k, block) + cdiv(max(one.n for one in group), block)
    sizes = (c.k, *_four([one.n for one in group]), counters or None)
    ranks = tuple(one.r for one in group), _ranks(group), columns
    static = (*sizes, *ranks, len(group), operands[0].terms == 4, block)
    launch = Launch(hopper_group_pack_kernel, (most, len(group), 1), static, num_warps=4)

    def step(stream: int | None, lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor]) -> GroupOperands:
        a = [_new(c, width, c.k, dtype=torch.bfloat16) for width in columns]
        b = [_new(c, one.n, width, dtype=torch.bfloat16) for one, width in zip(group, columns, strict=True)]
        zeros = _new(c, counters, dtype=torch.int32) if counters else None
        launch(stream, *_four(lora_as), *_four(lora_bs), *_four(a), *_four(b), zeros)
        return a, b, zeros

    return step


def group_shrink_counters(config: HopperGroupShrink, group: Group) -> int:
    """Counters that ``group_shrink_step`` needs, 0 where one program has all of K."""
    c = group[0]
    return cdiv(c.m, config.block_m) if config.splits(c.m, c.k, c.machine.sm_count) > 1 else 0


def group_shrink_step(config: HopperGroupShrink, group: Group) -> Step:
    """``step(stream, x, a_operands, counters, states, scales)`` -> every h's operand, and every mask's words or None.

    ``states``: each member's seed, None without dropout.
    """
    c, ranks, count = group[0], _ranks(group), len(group)
    split = config.splits(c.m, c.k, c.machine.sm_count)
    keep16 = 65536 - dropout_threshold(c.p) if c.masked else 0
    tile = (config.block_m, config.block_k, ranks, max(ranks), sum(ranks), count, config.stages, split, c.masked)
    grid = (cdiv(c.m, config.block_m), split, 1)
    launch = Launch(hopper_group_shrink_kernel, grid, (keep16, c.m, c.k, *tile), **config.options)
    x_block, a_blocks = (config.block_m, config.block_k), [(rank, config.block_k) for rank in ranks]
    none = _four([])

    def step(
        stream: int | None,
        x: Tensor,
        adapters: Sequence[Tensor],
        counters: Tensor | None,
        states: Sequence[Tensor] | None,
        scales: Sequence[float],
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        hidden = [_new(c, c.m, 2 * rank, dtype=torch.bfloat16) for rank in ranks]
        words = [_new(c, c.m, row_words(c.k), dtype=torch.int32) for _ in ranks] if c.masked else None
        parts = [_new(c, split, c.m, rank, dtype=torch.float32) for rank in ranks] if split > 1 else []
        operands = [descriptor(a, block) for a, block in zip(adapters, a_blocks, strict=True)]
        launch(
            stream,
            descriptor(x, x_block),
            *_four(operands),
            *(none if words is None else _four(words)),
            *_four(hidden),
            *_four(parts),
            counters if split > 1 else None,
            *(_four(states) if c.masked and states is not None else none),
            *_four(scales),
        )
        return hidden, words

    return step


def group_product_step(g: HopperProduct, group: Group) -> Step:
    """``step(stream, x, weights, hs, b_operands, biases)`` -> every y_i = x W_iᵀ + s_i h_i B_iᵀ + bias_i.

    ``biases``: each member's bias or None.
    """
    c, (widths, blocks, extra) = group[0], _terms(group)
    tiles = cdiv(c.m, g.block_m) * sum(cdiv(one.n, g.block_n) for one in group)
    tile = (g.block_m, g.block_n, g.block_k, widths, blocks, extra, len(group), g.stages, g.group_m, g.epilogue_n)
    static = (c.m, c.k, *_four([one.n for one in group]), *tile, g.buffers, _CONSUMER_REGISTERS)
    launch = Launch(hopper_group_product_kernel, (min(tiles, c.machine.sm_count), 1, 1), static, **g.options)
    x_block, w_block, y_block = (g.rows, g.block_k), (g.block_n, g.block_k), (g.rows, g.epilogue_n)

    def step(
        stream: int | None,
        x: Tensor,
        weights: Sequence[Tensor],
        hidden: Sequence[Tensor],
        adapters: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        ys = [_new(c, c.m, one.n, dtype=c.dtype) for one in group]
        launch(
            stream,
            descriptor(x, x_block),
            *_four([descriptor(weight, w_block) for weight in weights]),
            *_four([descriptor(h, (g.rows, width)) for h, width in zip(hidden, widths, strict=True)]),
            *_four([descriptor(b, (g.block_n, width)) for b, width in zip(adapters, widths, strict=True)]),
            *_four([descriptor(y, y_block) for y in ys]),
            *_four(biases),
        )
        return ys

    return step


def group_dx_step(config: HopperGroupDx, group: Group) -> Step:
    """``step(stream, dys, weights, dhs, a_operands, words)`` -> dx = Σ_i dy_i W_i + mask_i * (dh_i A_i)."""
    c, g, (widths, blocks, extra) = group[0], config.product, _terms(group)
    tiles = cdiv(c.m, g.block_m) * cdiv(c.k, g.block_n)
    tile = (g.block_m, g.block_n, g.block_k, widths, blocks, extra, len(group), g.stages, g.group_m)
    sizes = (c.m, c.k, *_four([one.n for one in group]))
    static = (*sizes, *tile, g.epilogue_n, g.buffers, g.masked, _CONSUMER_REGISTERS)
    launch = Launch(hopper_group_dx_kernel, (min(tiles, c.machine.sm_count), 1, 1), static, **g.options)
    dy_block, w_block, m_block = (g.rows, g.block_k), (g.block_k, g.block_n), (g.rows, g.block_n // 32)

    def step(
        stream: int | None,
        dys: Sequence[Tensor],
        weights: Sequence[Tensor],
        hidden: Sequence[Tensor],
        adapters: Sequence[Tensor],
        words: Sequence[Tensor] | None = None,
    ) -> Tensor:
        dx = _new(c, c.m, c.k, dtype=c.dtype)
        launch(
            stream,
            *_four([descriptor(dy, dy_block) for dy in dys]),
            *_four([descriptor(weight, w_block) for weight in weights]),
            *_four([descriptor(dh, (g.rows, width)) for dh, width in zip(hidden, widths, strict=True)]),
            *_four([descriptor(a, (width, g.block_n)) for a, width in zip(adapters, widths, strict=True)]),
            *_four([descriptor(each, m_block) for each in words or ()]),
            descriptor(dx, (g.rows, g.epilogue_n)),
        )
        return dx

    return step


def group_dh_db_step(config: HopperDhDb, group: Group) -> Step:
    """``step(stream, dys, b_operands, hs, scales)`` -> every dh's operand, and every db's parts."""
    c, ranks, count = group[0], _ranks(group), len(group)
    columns = tuple(cdiv(one.n, config.block_n) for one in group)
    chunk, chunks = chunk_of(c.m, config.block_m, sum(columns), c.machine.sm_count * config.ctas)
    sizes = (c.m, *_four([one.n for one in group]), chunk)
    static = (*sizes, config.block_m, config.block_n, ranks, max(ranks), count, config.stages)
    launch = Launch(hopper_group_dh_db_kernel, (max(columns), chunks, count), static, **config.options)
    block = 32 if max(ranks) <= 32 else 16
    reduced = (c.m, columns, ranks, count, block)
    total = Launch(hopper_group_reduce_dh_kernel, (cdiv(c.m, block), count, 1), reduced, num_warps=4)
    dy_block = (config.block_m, config.block_n)

    def step(
        stream: int | None,
        dys: Sequence[Tensor],
        adapters: Sequence[Tensor],
        hidden: Sequence[Tensor],
        scales: Sequence[float],
    ) -> tuple[list[Tensor], list[Tensor]]:
        dh_parts = [_new(c, of, c.m, rank, dtype=torch.float32) for of, rank in zip(columns, ranks, strict=True)]
        db_parts = [_new(c, chunks, one.n, rank, dtype=torch.float32) for one, rank in zip(group, ranks, strict=True)]
        dhs = [_new(c, c.m, 2 * rank, dtype=torch.bfloat16) for rank in ranks]
        launch(
            stream,
            *_four([descriptor(dy, dy_block) for dy in dys]),
            *_four([descriptor(b, (config.block_n, rank)) for b, rank in zip(adapters, ranks, strict=True)]),
            *_four([descriptor(h, (config.block_m, rank)) for h, rank in zip(hidden, ranks, strict=True)]),
            *_four(dh_parts),
            *_four(db_parts),
        )
        total(stream, *_four(dh_parts), *_four(dhs), *_four(scales))
        return dhs, db_parts

    return step


def group_da_step(config: HopperGroupDa, group: Group) -> Step:
    """``step(stream, x, dhs, words)`` -> every da's parts, as many a member."""
    c, ranks = group[0], _ranks(group)
    columns = cdiv(c.k, config.block_n)
    chunk, chunks = chunk_of(c.m, config.block_m, columns, c.machine.sm_count * config.ctas)
    tile = (config.block_m, config.block_n, ranks, max(ranks), sum(ranks), len(group), config.masked, config.stages)
    launch = Launch(hopper_group_da_kernel, (columns, chunks, 1), (c.m, c.k, chunk, *tile), **config.options)
    x_block, m_block = (config.block_m, config.block_n), (config.block_m, config.block_n // 32)

    def step(
        stream: int | None, x: Tensor, hidden: Sequence[Tensor], words: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        parts = [_new(c, chunks, c.k, rank, dtype=torch.float32) for rank in ranks]
        launch(
            stream,
            descriptor(x, x_block),
            *_four([descriptor(dh, (config.block_m, rank)) for dh, rank in zip(hidden, ranks, strict=True)]),
            *_four([descriptor(each, m_block) for each in words or ()]),
            *_four(parts),
        )
        return parts

    return step


def group_reduce_grads_step(group: Group, a_dtype: torch.dtype | None, b_dtype: torch.dtype | None) -> Step:
    """``step(stream, a_parts, b_parts)`` -> every da, every db; a dtype of None: not due, and its parts are None."""
    c, block = group[0], 32
    ks = [0 if a_dtype is None else c.k] * len(group)
    ns = [0 if b_dtype is None else one.n for one in group]
    static = (tuple(one.r for one in group), _ranks(group), len(group), block)
    grid = (max(cdiv(k, block) + cdiv(n, block) for k, n in zip(ks, ns, strict=True)), len(group), 1)
    launches: dict[tuple[int, int], Launch] = {}

    def step(
        stream: int | None, a_parts: Sequence[Tensor] | None, b_parts: Sequence[Tensor] | None
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        das = None if a_dtype is None else [_new(c, one.r, one.k, dtype=a_dtype) for one in group]
        dbs = None if b_dtype is None else [_new(c, one.n, one.r, dtype=b_dtype) for one in group]
        counts = (0 if a_parts is None else a_parts[0].shape[0], 0 if b_parts is None else b_parts[0].shape[0])
        launch = launches.get(counts)
        if launch is None:
            made = (*_four(ks), *_four(ns), *counts, *static)
            launch = launches[counts] = Launch(hopper_group_reduce_grads_kernel, grid, made, num_warps=4)
        # What is not due has no columns: its pointers are the other's, and nothing is read or written by them.
        launch(
            stream,
            *_four(a_parts or b_parts or ()),
            *_four(b_parts or a_parts or ()),
            *_four(das or dbs or ()),
            *_four(dbs or das or ()),
        )
        return das, dbs

    return step
