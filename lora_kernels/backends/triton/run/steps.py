"""The steps that backward's plans and the part operators are made of: kernels, grids, memory between them.

A step is made ready once for each call (sizes, strides, dtypes) and configuration; see ``prepared``. All are for sizes
above 0. What comes in parts is summed by ``reduce_kernel``, in the order of the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ....errors import InvalidArgumentError
from ....kept import row_words
from ....reference import dropout_threshold
from ..choose.blocks import DhDbConfig, ExpandConfig, GemmConfig, OuterConfig, ShrinkConfig
from ..choose.plans import BackwardPlan, DxFused
from ..kernels.backward import da_kernel, dh_db_kernel, reduce_kernel
from ..kernels.forward import shrink_kernel
from ..kernels.input_grad import dx_kernel, dx_low_rank_kernel, dx_persistent_kernel
from ..kernels.packed import draw_kernel
from .call import Call, cdiv
from .prepared import Launch, ScratchLaunch

__all__ = [
    "Step",
    "da_step",
    "db_step",
    "dh_db_step",
    "dh_step",
    "draw_step",
    "dx_step",
    "input_grad_step",
    "low_rank_launch",
    "reduce_launch",
    "seeded",
    "shrink_launch",
    "shrink_step",
]

Step: TypeAlias = Callable[..., Any]

_REDUCE_BLOCK = 512
_DRAW_ROWS, _DRAW_WORDS = 8, 64  # of one program, 4 words a thread


def draw_step(m: int, k: int, p: float, members: int | None = None) -> Step:
    """``step(stream, seed)`` -> the words of ``packed_mask``, int32 (M, 4 ceil(K / 128)), for a seed int64 (2,).

    With ``members``: (members, M, 4 ceil(K / 128)), for seeds (members, 2).
    """
    shape = (m, row_words(k)) if members is None else (members, m, row_words(k))
    grid = (cdiv(m, _DRAW_ROWS), cdiv(row_words(k), _DRAW_WORDS), members or 1)
    static = (m, k, 65536 - dropout_threshold(p), _DRAW_ROWS, _DRAW_WORDS)
    launch = Launch(draw_kernel, grid, static, num_warps=4)

    def step(stream: int | None, seed: Tensor) -> Tensor:
        words = torch.empty(shape, dtype=torch.int32, device=seed.device)
        if all(shape):
            launch(stream, seed, words)
        return words

    return step


def seeded(run: Step, state: Tensor | None, m: int, k: int, p: float) -> Step:
    """``run``, whose last argument is the packed mask, for such a ``state``: None, the words, or what they are drawn
    from before: a seed (2,), or one of each member (members, 2).

    Raises:
        InvalidArgumentError: words of another mask, which kernels would read past their end.
    """
    if state is None:
        return run
    if state.dtype is torch.int32:
        if state.shape[-2:] != (m, row_words(k)):
            raise InvalidArgumentError(
                f"the mask's words have the shape {tuple(state.shape)} and must have {(m, row_words(k))} for {m} "
                f"tokens of {k} columns: give the words that forward gave for this x."
            )
        return run
    draw = draw_step(m, k, p, None if state.dim() == 1 else state.shape[0])
    return lambda stream, *arguments: run(stream, *arguments[:-1], draw(stream, arguments[-1]))


def shrink_launch(
    config: ShrinkConfig,
    m: int,
    k: int,
    r: int,
    stride_x: tuple[int, ...],
    stride_a: tuple[int, ...],
    precision: str,
    dtype: torch.dtype,
    pdl: bool = False,
    padded_rank: int = 0,
) -> Launch:
    """``launch(stream, x, a, h, words, scale)``; with a padded rank h is its operand, if it comes in one part."""
    if dtype is torch.float16:
        config = _as_high_and_low(config)
    tile = (config.block_m, config.block_k, config.block_r, config.splits, padded_rank, k % config.block_k == 0)
    return Launch(
        shrink_kernel,
        (cdiv(m, config.block_m), cdiv(max(r, padded_rank), config.block_r), config.splits),
        (m, k, r, *stride_x, *stride_a, *tile, precision, pdl),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _as_high_and_low(config: ShrinkConfig) -> ShrinkConfig:
    """For fp16: x and A have a high and a low number each; a wide block of ranks or of K leaves them no registers."""
    block_m = min(config.block_m, 32) if config.block_r > 32 else config.block_m
    deepest = 32 if config.block_r >= 128 else 128 if config.block_r <= 16 and block_m >= 64 else 64
    return replace(config, block_m=block_m, block_k=min(config.block_k, deepest))


def reduce_launch(first: int, second: int, sums: int, first_count: int, count: int, scaled: bool = True) -> Launch:
    """``launch(stream, first_parts, second_parts, sums_parts, first, second, sums, scaling)``: sizes, and counts.

    ``scaled``: whether scaling acts on ``second`` too.
    """
    grid = (sum(cdiv(size, _REDUCE_BLOCK) for size in (first, second, sums)), 1, 1)
    return Launch(reduce_kernel, grid, (first, second, sums, first_count, count, _REDUCE_BLOCK, scaled), num_warps=4)


def shrink_step(
    config: ShrinkConfig,
    c: Call,
    m: int,
    k: int,
    strides: tuple[tuple[int, ...], tuple[int, ...]],
) -> Step:
    """``step(stream, x, a, scale, words)`` -> scale (x * keep) aᵀ, (M, R) fp32, for x (M, K) and a (R, K)."""
    launch = shrink_launch(config, m, k, c.r, *strides, c.precision, c.dtype)
    parts, shape, device = config.splits, (m, c.r), c.device
    total = reduce_launch(m * c.r, 0, 0, parts, 0)

    def step(stream: int | None, x: Tensor, a: Tensor, scale: float, words: Tensor | None) -> Tensor:
        out = torch.empty(shape, dtype=torch.float32, device=device)
        if parts == 1:
            launch(stream, x, a, out, words, scale)
            return out
        own = torch.empty((parts, *shape), dtype=torch.float32, device=device)
        launch(stream, x, a, own, words, scale)
        total(stream, own, None, None, out, None, None, 1.0)
        return out

    return step


def dh_step(config: ShrinkConfig, c: Call) -> Step:
    """``step(stream, dy, lora_b, scaling)`` -> dh."""
    shrink = shrink_step(config, c, c.m, c.n, (c.stride_dy, (c.stride_b[1], c.stride_b[0])))
    return lambda stream, dy, lora_b, scaling: shrink(stream, dy, lora_b, scaling, None)


def dh_db_step(config: DhDbConfig, c: Call) -> Step:
    """``step(stream, dy, lora_b, h, scaling)`` -> dh, db, and dbias where it is due."""
    m, n, r, device = c.m, c.n, c.r, c.device
    if c.bias_dtype is not None and c.machine.capability < 90:  # dbias too: the widest tile leaves it no registers
        config = replace(config, block_n=min(config.block_n, 128))
    if c.dtype is torch.float16:  # dy and B, high and low: the same; fewer ranks, for less wide tiles write more of dh
        config = replace(config, block_n=min(config.block_n, 64), block_r=min(config.block_r, 32))
    dh_count, count = cdiv(n, config.block_n), cdiv(m, config.chunk_m)
    tile = (config.block_m, config.block_n, config.block_r)
    first = Launch(
        dh_db_kernel,
        (dh_count, count, cdiv(r, config.block_r)),
        (m, n, r, config.chunk_m, *c.stride_dy, *c.stride_b, c.stride_h, *tile, c.padded_rank, c.split, c.precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    sums = 0 if c.bias_dtype is None else n
    second = reduce_launch(m * r, n * r, sums, dh_count, count, scaled=c.operand is None)

    def step(
        stream: int | None, dy: Tensor, lora_b: Tensor, h: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dh = torch.empty((m, r), dtype=torch.float32, device=device)
        db = torch.empty((n, r), dtype=c.b_dtype, device=device)
        dh_parts = torch.empty((dh_count, m, r), dtype=torch.float32, device=device)
        db_parts = torch.empty((count, n, r), dtype=torch.float32, device=device)
        dbias = dbias_parts = None
        if c.bias_dtype is not None:
            dbias = torch.empty(n, dtype=c.bias_dtype, device=device)
            dbias_parts = torch.empty((count, n), dtype=torch.float32, device=device)
        first(stream, dy, lora_b, h, dh_parts, db_parts, dbias_parts)
        second(stream, dh_parts, db_parts, dbias_parts, dh, db, dbias, scaling)
        return dh, db, dbias

    return step


def db_step(config: OuterConfig, c: Call) -> Step:
    """``step(stream, dy, h, scaling)`` -> db alone."""
    outer = _outer_step(config, c, c.n, c.stride_h, c.stride_dy, (c.n, c.r), (1, c.r), c.b_dtype, c.padded_rank)
    if c.operand is not None:  # s is in h
        return lambda stream, dy, h, scaling: outer(stream, h, dy, None, 1.0)
    return lambda stream, dy, h, scaling: outer(stream, h, dy, None, scaling)


def da_step(config: OuterConfig, c: Call) -> Step:
    """``step(stream, dh, x, words)`` -> da in ``c.a_dtype``."""
    outer = _outer_step(config, c, c.k, c.stride_dh, c.stride_x, (c.r, c.k), (c.k, 1), c.a_dtype)
    scale = c.keep_scale
    return lambda stream, dh, x, words: outer(stream, dh, x, words, scale)


def _outer_step(
    config: OuterConfig,
    c: Call,
    columns: int,
    stride_left: int,
    stride_x: tuple[int, ...],
    shape: tuple[int, int],
    strides: tuple[int, int],
    dtype: torch.dtype,
    padded_rank: int = 0,
) -> Step:
    """``step(stream, left, x, words, scale)`` -> scale leftᵀ (x * keep); ``strides`` are of rank and column."""
    if c.dtype is torch.float16:  # x, high and low: taller blocks leave it no registers
        config = replace(config, block_m=min(config.block_m, 32))
    chunk_m = config.block_m * cdiv(cdiv(c.m, config.splits), config.block_m)
    count, device, size = cdiv(c.m, chunk_m), c.device, c.r * columns
    tile = (config.block_m, config.block_k, config.block_r, padded_rank)
    sizes = (c.m, columns, c.r, chunk_m)
    launch = Launch(
        da_kernel,
        (cdiv(columns, config.block_k), cdiv(c.r, config.block_r), count),
        (*sizes, stride_left, *stride_x, *strides, *tile, c.split, c.precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    total = reduce_launch(0, size, 0, 0, count)

    def step(stream: int | None, left: Tensor, x: Tensor, words: Tensor | None, scale: float) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        if count == 1:
            launch(stream, left, x, words, out, scale)
            return out
        parts = torch.empty((count, *shape), dtype=torch.float32, device=device)
        launch(stream, left, x, words, parts, scale)
        total(stream, None, parts, None, None, out, None, 1.0)
        return out

    return step


def dx_step(plan: BackwardPlan, c: Call) -> Step:
    """``step(stream, dy, weight, dh, lora_a, words)`` -> dx, by the plan's way."""
    if isinstance(plan, DxFused):
        return _dx_fused(plan.gemm, plan.variant, c)
    several = input_grad_step(plan.expand, c, (0, c.r))
    return lambda stream, dy, weight, dh, lora_a, words: several(stream, [dy], [weight], dh, lora_a, words)


def _dx_fused(g: GemmConfig, variant: str, c: Call) -> Step:
    shape = (c.m, c.k)
    sizes = (c.m, c.n, c.k, c.r, c.keep_scale)
    tiles = cdiv(c.m, g.block_rows) * cdiv(c.k, g.block_columns)
    tile = (g.block_rows, g.block_sum, g.block_columns, g.block_r, g.group_m)
    options: dict[str, Any] = {"num_warps": g.num_warps, "num_stages": g.num_stages}
    if variant != "pointer" and c.by_descriptor:
        static = (*sizes, c.stride_dy[0], c.stride_w[0], c.stride_dh, *c.stride_a, *tile, c.split, c.precision)
        grid = (min(tiles, c.machine.sm_count), 1, 1)
        launch: Launch = ScratchLaunch(dx_persistent_kernel, grid, static, **options)
    else:
        static = (*sizes, *c.stride_dy, *c.stride_w, c.stride_dh, *c.stride_a, *tile)
        static += (c.n % g.block_sum == 0, c.split, c.precision)
        launch = Launch(dx_kernel, (tiles, 1, 1), static, **options)

    def step(
        stream: int | None, dy: Tensor, weight: Tensor, dh: Tensor, lora_a: Tensor, words: Tensor | None
    ) -> Tensor:
        dx = torch.empty(shape, dtype=c.dtype, device=c.device)
        launch(stream, dy, weight, dh, lora_a, words, dx)
        return dx

    return step


def input_grad_step(config: ExpandConfig, c: Call, starts: tuple[int, ...]) -> Step:
    """``step(stream, dys, weights, dh, lora_a, words)`` -> Σ_i dy_i W_i + D_i * (dh_i A_i).

    Member i has the columns of dh and the rows of lora_a from ``starts[i]`` on, and ``words[i]`` of several. The
    low-rank terms of all members are one launch; each base is the library's product.
    """
    shape, low_rank = (c.m, c.k), low_rank_launch(config, c, starts)

    def step(
        stream: int | None,
        dys: list[Tensor],
        weights: list[Tensor],
        dh: Tensor,
        lora_a: Tensor,
        words: Tensor | None,
    ) -> Tensor:
        dx = torch.empty(shape, dtype=c.dtype, device=c.device)
        low_rank(stream, dh, lora_a, words, dx)
        for dy, weight in zip(dys, weights, strict=True):
            dx.addmm_(dy, weight)
        return dx

    return step


def low_rank_launch(config: ExpandConfig, c: Call, starts: tuple[int, ...]) -> Launch:
    """``launch(stream, dh, lora_a, words, dx)``: the low-rank terms are written to dx."""
    if c.dtype is torch.float16 and c.machine.capability < 90:  # A, high and low: the mask leaves them no registers
        config = replace(config, block_r=min(config.block_r, 16))
    tile = (config.block_m, config.block_n, config.block_r, c.split, c.precision)
    return Launch(
        dx_low_rank_kernel,
        (cdiv(c.m, config.block_m) * cdiv(c.k, config.block_n), 1, 1),
        (c.m, c.k, starts, c.keep_scale, c.stride_dh, *c.stride_a, *tile),
        num_warps=config.num_warps,
        num_stages=1,
    )
