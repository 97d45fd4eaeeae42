"""The Gluon kernels' host side: the steps that a plan for compute capability 9.0 can be built of.

Each ``..._step`` is made ready once for a call's sizes and a configuration, and returns a function of the stream and
the tensors: see ``prepared.Launch``. What a caller keeps a step by has to hold sizes, dtypes and alignments. All
sizes are above 0.

Between the steps: ``pack`` makes the adapters' operands (and zeroes the counters of the call's other launches); h and
dh are operands by ``choose.hidden_operand``. Workspaces and counters are allocated by each call: nothing outlives it,
so two streams may run one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ....kept import row_words
from ....reference import dropout_threshold
from ..choose.hopper_blocks import (
    HopperDhDb,
    HopperOuter,
    HopperPlainShrink,
    HopperProduct,
    HopperProductH,
    HopperShrink,
    chunk_of,
)
from ..kernels.hopper.outer import hopper_dh_db_kernel, hopper_outer_kernel
from ..kernels.hopper.product import hopper_product_kernel
from ..kernels.hopper.product_h import hopper_product_h_kernel
from ..kernels.hopper.shrink import hopper_shrink_kernel
from ..kernels.hopper.small import (
    hopper_pack_kernel,
    hopper_plain_shrink_kernel,
    hopper_reduce_dh_kernel,
    hopper_reduce_grads_kernel,
)
from .call import cdiv
from .descriptors import descriptor
from .hopper_call import HopperCall
from .prepared import Launch

__all__ = [
    "Operands",
    "da_step",
    "db_step",
    "dh_db_step",
    "dh_step",
    "dx_h_step",
    "dx_step",
    "halves",
    "pack_step",
    "plain_shrink_step",
    "product_h_counters",
    "product_h_step",
    "product_step",
    "reduce_grads_step",
    "shrink_counters",
    "shrink_step",
]

Step: TypeAlias = Callable[..., Any]

_CONSUMER_REGISTERS = 240
_PACK_NUMBERS = 64 * 32  # of one program: more leave it no registers


class Operands(NamedTuple):
    """A's (columns, K) and B's (N, columns) operands, bf16, and zeroed counters where some were asked for."""

    a: Tensor
    b: Tensor
    counters: Tensor | None


def _new(c: HopperCall, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=c.device)


def pack_step(
    c: HopperCall,
    strides: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    counters: int = 0,
) -> Step:
    """``step(stream, lora_a, lora_b)`` -> Operands; ``strides`` of A and B, None where both are contiguous."""
    operand = c.operand
    columns = operand.adapter_columns
    block = min(64, _PACK_NUMBERS // columns)
    split = operand.terms == 4
    stride_a, stride_b = strides or ((None, None), (None, None))
    launch = Launch(
        hopper_pack_kernel,
        (cdiv(c.k, block) + cdiv(c.n, block), 1, 1),
        (*stride_a, *stride_b, c.k, c.n, counters or None, c.r, operand.rank, columns, split, block),
        num_warps=4,
    )

    def step(stream: int | None, lora_a: Tensor, lora_b: Tensor) -> Operands:
        a, b = (_new(c, *shape, dtype=torch.bfloat16) for shape in ((columns, c.k), (c.n, columns)))
        zeros = _new(c, counters, dtype=torch.int32) if counters else None
        launch(stream, lora_a, lora_b, a, b, zeros)
        return Operands(a, b, zeros)

    return step


def shrink_counters(config: HopperShrink, c: HopperCall, k: int) -> int:
    """Counters that ``shrink_step`` (or ``dh_step``) needs, 0 where one program has all of K."""
    split = config.splits(c.m, k, c.machine.sm_count)
    return cdiv(c.m, config.block_m) if split > 1 else 0


def shrink_step(config: HopperShrink, c: HopperCall) -> Step:
    """``step(stream, x, a_operand, counters, state, scale)`` -> h's operand, and the mask's words or None."""
    shrink = _shrink_step(config, c, c.k, True, c.masked)
    return lambda stream, x, a, counters, state, scale: shrink(stream, x, a, counters, state, scale)


def dh_step(config: HopperShrink, c: HopperCall) -> Step:
    """``step(stream, dy, b_operand, counters, scale)`` -> dh's operand, in a read of dy of its own."""
    shrink = _shrink_step(config, c, c.n, False, False)
    return lambda stream, dy, b, counters, scale: shrink(stream, dy, b, counters, None, scale)[0]


def _shrink_step(config: HopperShrink, c: HopperCall, k: int, by_row: bool, masked: bool) -> Step:
    operand, rank = c.operand, c.operand.rank
    split = config.splits(c.m, k, c.machine.sm_count)
    keep16 = 65536 - dropout_threshold(c.p) if masked else 0
    tile = (config.block_m, config.block_k, rank, operand.columns, config.stages, split, masked, by_row, 4, 7)
    launch = Launch(hopper_shrink_kernel, (cdiv(c.m, config.block_m), split, 1), (c.m, k, *tile), **config.options)
    blocks = (config.block_m, config.block_k), (rank, config.block_k) if by_row else (config.block_k, rank)

    def step(
        stream: int | None, x: Tensor, adapter: Tensor, counters: Tensor | None, state: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        hidden = _new(c, c.m, operand.columns, dtype=torch.bfloat16)
        words = _new(c, c.m, row_words(k), dtype=torch.int32) if masked else None
        parts = _new(c, split, c.m, rank, dtype=torch.float32) if split > 1 else None
        operands = descriptor(x, blocks[0]), descriptor(adapter, blocks[1])
        launch(
            stream,
            *operands,
            words,
            hidden,
            parts,
            counters,
            scale,
            keep16,
            None,
            None,
            None,
            state if masked else None,
        )
        return hidden, words

    return step


def plain_shrink_step(config: HopperPlainShrink, c: HopperCall, stride_x: int) -> Step:
    """``step(stream, x, a_operand, scale)`` -> h's operand, without dropout; x's rows are ``stride_x`` apart."""
    operand = c.operand
    static = (c.m, c.k, None if stride_x == c.k else stride_x, c.k, operand.rank, operand.columns)
    grid = (cdiv(c.m, config.block_m), 1, 1)
    launch = Launch(hopper_plain_shrink_kernel, grid, (*static, config.block_m, config.block_k), **config.options)

    def step(stream: int | None, x: Tensor, adapter: Tensor, scale: float) -> Tensor:
        hidden = _new(c, c.m, operand.columns, dtype=torch.bfloat16)
        launch(stream, x, adapter, hidden, scale)
        return hidden

    return step


def product_step(config: HopperProduct, c: HopperCall) -> Step:
    """``step(stream, x, weight, h, b_operand, gain, bias)`` -> y = gain * (x Wᵀ + s h Bᵀ) + bias."""
    product = _product_step(config, c, c.n, c.k, True)
    return lambda stream, x, weight, h, b, gain=None, bias=None: product(stream, x, weight, h, b, None, gain, bias)


def dx_step(config: HopperProduct, c: HopperCall) -> Step:
    """``step(stream, dy, weight, dh, a_operand, words)`` -> dx = dy W + mask * (dh A)."""
    product = _product_step(config, c, c.k, c.n, False)
    return lambda stream, dy, weight, dh, a, words=None: product(stream, dy, weight, dh, a, words, None, None)


def _product_step(g: HopperProduct, c: HopperCall, columns: int, summed: int, forward: bool) -> Step:
    operand = c.operand
    steps, extra = operand.columns // operand.step, operand.adapter_columns // operand.step
    tiles = cdiv(c.m, g.block_m) * cdiv(columns, g.block_n)
    tile = (g.block_m, g.block_n, g.block_k, operand.step, steps, extra, g.mode, forward, g.stages, g.group_m)
    static = (c.m, columns, summed, *tile, g.epilogue_n, g.buffers, False, g.masked, _CONSUMER_REGISTERS)
    launch = Launch(hopper_product_kernel, (min(tiles, c.machine.sm_count), 1, 1), static, **g.options)
    x_block, y_block, h_block = (g.rows, g.block_k), (g.rows, g.epilogue_n), (g.rows, operand.step)
    w_block = (g.block_n, g.block_k) if forward else (g.block_k, g.block_n)
    b_block = (g.block_n, operand.step) if forward else (operand.step, g.block_n)
    m_block = (g.rows, g.block_n // 32)

    def step(
        stream: int | None,
        x: Tensor,
        weight: Tensor,
        hidden: Tensor,
        adapter: Tensor,
        words: Tensor | None,
        gain: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        y = _new(c, c.m, columns, dtype=c.dtype)
        x_desc = descriptor(x, x_block)
        m_desc = x_desc if words is None else descriptor(words, m_block)
        operands = x_desc, descriptor(weight, w_block), descriptor(hidden, h_block), descriptor(adapter, b_block)
        launch(stream, *operands, m_desc, descriptor(y, y_block), gain, bias)
        return y

    return step


def product_h_counters(config: HopperProductH, c: HopperCall) -> int:
    """Counters that ``product_h_step`` and ``dx_h_step`` need: flags of rows of tiles, who is done, who has met."""
    return (3 if config.exact else 1) * cdiv(c.m, config.block_m) + 1


def halves(config: HopperProductH, c: HopperCall) -> Tensor | None:
    """Where both halves of h, or of dh, meet."""
    return _new(c, 2, c.m, c.operand.rank, dtype=torch.float32) if config.exact else None


def product_h_step(config: HopperProductH, c: HopperCall) -> Step:
    """``step(stream, x, weight, a_operand, b_operand, counters, scale, gain, bias)`` -> y, h's operand; no dropout."""
    product = _product_h_step(config, c, c.n, c.k, True)
    return lambda stream, x, weight, a, b, counters, scale, gain=None, bias=None: product(
        stream, x, weight, a, b, counters, scale, gain, bias, halves(config, c)
    )


def dx_h_step(config: HopperProductH, c: HopperCall) -> Step:
    """``step(stream, dy, weight, b_operand, a_operand, counters, scale, half)`` -> dx, dh's operand; no dropout.

    ``half`` is what ``halves`` gives: the caller's, who may run another kernel beside this one.
    """
    product = _product_h_step(config, c, c.k, c.n, False)
    return lambda stream, dy, weight, b, a, counters, scale, half: product(
        stream, dy, weight, b, a, counters, scale, None, None, half
    )


def _product_h_step(g: HopperProductH, c: HopperCall, columns: int, summed: int, forward: bool) -> Step:
    operand, rank = c.operand, c.operand.rank
    extra = operand.columns // operand.step
    tiles = cdiv(c.m, g.block_m) * cdiv(columns, g.block_n)
    tile = (g.block_m, g.block_n, g.block_k, rank, operand.step, extra, forward, g.stages, g.group_m)
    static = (c.m, columns, summed, *tile, g.epilogue_n, g.buffers, _CONSUMER_REGISTERS)
    launch = Launch(hopper_product_h_kernel, (min(tiles, c.machine.sm_count), 1, 1), static, **g.options)
    rows = g.block_m // 2
    w_block = (g.block_n, g.block_k) if forward else (g.block_k, g.block_n)
    a_block = (rank, g.block_k) if forward else (g.block_k, rank)
    b_block = (g.block_n, operand.step) if forward else (operand.step, g.block_n)
    blocks = ((rows, g.block_k), w_block, a_block, (rows, operand.step), b_block, (rows, g.epilogue_n))

    def step(
        stream: int | None,
        x: Tensor,
        weight: Tensor,
        inner: Tensor,
        outer: Tensor,
        counters: Tensor,
        scale: float,
        gain: Tensor | None,
        bias: Tensor | None,
        half: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y = _new(c, c.m, columns, dtype=c.dtype)
        hidden = _new(c, c.m, operand.columns, dtype=torch.bfloat16)
        tensors = (x, weight, inner, hidden, outer, y)
        descriptors = [descriptor(tensor, block) for tensor, block in zip(tensors, blocks, strict=True)]
        launch(stream, *descriptors, hidden, half, counters, gain, bias, scale)
        return y, hidden

    return step


def dh_db_step(config: HopperDhDb, c: HopperCall) -> Step:
    """``step(stream, dy, b_operand, h, scale)`` -> dh's operand, and db's parts for ``reduce_grads_step``."""
    operand, rank = c.operand, c.operand.rank
    columns = cdiv(c.n, config.block_n)
    chunk, count = chunk_of(c.m, config.block_m, columns, c.machine.sm_count * config.ctas)
    static = (c.m, c.n, chunk, config.block_m, config.block_n, rank, True, config.stages)
    launch = Launch(hopper_dh_db_kernel, (columns, count, 1), static, **config.options)
    total = _reduce_dh_launch(c, columns)
    blocks = (config.block_m, config.block_n), (config.block_n, rank), (config.block_m, rank)

    def step(stream: int | None, dy: Tensor, adapter: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        dh_parts = _new(c, columns, c.m, rank, dtype=torch.float32)
        db_parts = _new(c, count, c.n, rank, dtype=torch.float32)
        dh = _new(c, c.m, operand.columns, dtype=torch.bfloat16)
        operands = descriptor(dy, blocks[0]), descriptor(adapter, blocks[1]), descriptor(hidden, blocks[2])
        launch(stream, *operands, dh_parts, db_parts)
        total(stream, dh_parts, dh, scale)
        return dh, db_parts

    return step


def _reduce_dh_launch(c: HopperCall, parts: int) -> Launch:
    block = 32 if c.operand.rank <= 32 else 16
    static = (c.m, parts, c.operand.rank, c.operand.columns, block, True)
    return Launch(hopper_reduce_dh_kernel, (cdiv(c.m, block), 1, 1), static, num_warps=4)


def da_step(config: HopperOuter, c: HopperCall) -> Step:
    """``step(stream, x, dh, words)`` -> da's parts for ``reduce_grads_step``."""
    return _outer_step(config, c, c.k)


def db_step(config: HopperOuter, c: HopperCall) -> Step:
    """``step(stream, dy, h)`` -> db's parts, in a read of dy of its own."""
    return _outer_step(config, c, c.n)


def _outer_step(config: HopperOuter, c: HopperCall, size: int) -> Step:
    rank = c.operand.rank
    columns = cdiv(size, config.block_n)
    chunk, count = chunk_of(c.m, config.block_m, columns, c.machine.sm_count * config.ctas)
    static = (c.m, size, chunk, config.block_m, config.block_n, rank, True, config.masked, config.stages)
    launch = Launch(hopper_outer_kernel, (columns, count, 1), static, **config.options)
    x_block, h_block = (config.block_m, config.block_n), (config.block_m, rank)
    m_block = (config.block_m, config.block_n // 32)

    def step(stream: int | None, x: Tensor, hidden: Tensor, words: Tensor | None = None) -> Tensor:
        parts = _new(c, count, size, rank, dtype=torch.float32)
        x_desc = descriptor(x, x_block)
        m_desc = x_desc if words is None else descriptor(words, m_block)
        launch(stream, x_desc, descriptor(hidden, h_block), m_desc, parts)
        return parts

    return step


def reduce_grads_step(c: HopperCall, a_dtype: torch.dtype | None, b_dtype: torch.dtype | None) -> Step:
    """``step(stream, a_parts, b_parts)`` -> da, db; a dtype of None: not due, and its parts are None."""
    block = 32
    k, n = (0 if a_dtype is None else c.k), (0 if b_dtype is None else c.n)
    static = (c.r, c.operand.rank, block)
    grid = (cdiv(k, block) + cdiv(n, block), 1, 1)

    def make(a_count: int, b_count: int) -> Launch:
        return Launch(hopper_reduce_grads_kernel, grid, (k, n, a_count, b_count, *static), num_warps=4)

    launches: dict[tuple[int, int], Launch] = {}

    def step(stream: int | None, a_parts: Tensor | None, b_parts: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        da = None if a_dtype is None else _new(c, c.r, c.k, dtype=a_dtype)
        db = None if b_dtype is None else _new(c, c.n, c.r, dtype=b_dtype)
        counts = (0 if a_parts is None else a_parts.shape[0], 0 if b_parts is None else b_parts.shape[0])
        launch = launches.get(counts)
        if launch is None:
            launch = launches[counts] = make(*counts)
        # What is not due has no columns: its pointers are the other's, and nothing is read or written by them.
        launch(
            stream,
            b_parts if a_parts is None else a_parts,
            a_parts if b_parts is None else b_parts,
            db if da is None else da,
            da if db is None else db,
        )
        return da, db

    return step
