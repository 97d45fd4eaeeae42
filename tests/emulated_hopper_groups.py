"""The Gluon kernels of a group in PyTorch, with the same arguments, built of those of ``emulated_hopper``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import emulated_hopper as one
from emulated_hopper import (
    EMULATED,
    Grid,
    by_parts,
    cdiv,
    flat,
    load,
    low_rank,
    main_step,
    masked,
    put,
    put_hi_lo,
    shuffled,
    tile_of,
    write_tile,
)
from lora_kernels.packed_mask import packed_keep_words

__all__ = ["EMULATED"]


def members(values: dict[str, Any], name: str, count: int, suffix: str = "") -> list[Any]:
    """The arguments of the members that are there; the others have to be None."""
    found = [values[f"{name}{number}{suffix}"] for number in range(4)]
    assert all(value is None for value in found[count:]), f"{name} of a member that is not there"
    return found[:count]


def hopper_group_product_kernel(
    grid: Grid, *, x_desc: Any, M: int, K: int, BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, BLOCK_H: tuple[int, ...],
    H_BLOCKS: tuple[int, ...], EXTRA: tuple[int, ...], MEMBERS: int, STAGES: int, GROUP_M: int, EPI_N: int, NBUF: int,
    REGS: int, **values: Any,
) -> None:  # fmt: skip
    rows, num_m, steps = BLOCK_M // 2, cdiv(M, BLOCK_M), cdiv(K, BLOCK_K)
    w, h, b, y = (members(values, f"{name}_desc", MEMBERS) for name in "whby")
    ns, biases = members(values, "N", MEMBERS), [values[f"bias{i}"] for i in range(4)]
    assert max(BLOCK_H) <= BLOCK_K, "an extra step lies in a buffer of the ring"

    def tile(i: int, m0: int, n0: int) -> None:
        acc = torch.zeros(rows, BLOCK_N)
        for k in range(steps):
            acc += main_step(x_desc, w[i], m0, n0, k * BLOCK_K, rows, BLOCK_N, BLOCK_K, True)
        for j in range(EXTRA[i]):
            width = BLOCK_H[i]
            acc += low_rank(h[i], b[i], m0, n0, j % H_BLOCKS[i] * width, j * width, rows, BLOCK_N, width, True)
        write_tile(acc, y[i], m0, n0, None, biases[i], ns[i], EPI_N)

    for (program,) in shuffled(grid[0]):
        t, begin = program, 0
        for group in range(cdiv(num_m, GROUP_M)):
            tall = min(num_m - group * GROUP_M, GROUP_M)
            for i in range(MEMBERS):
                end = begin + tall * cdiv(ns[i], BLOCK_N)
                while t < end:
                    inside = t - begin
                    m0 = (group * GROUP_M + inside % tall) * BLOCK_M
                    for which in range(2):
                        tile(i, m0 + which * rows, inside // tall * BLOCK_N)
                    t += grid[0]
                begin = end


def hopper_group_dx_kernel(
    grid: Grid, *, dx_desc: Any, M: int, K: int, BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, BLOCK_H: tuple[int, ...],
    H_BLOCKS: tuple[int, ...], EXTRA: tuple[int, ...], MEMBERS: int, STAGES: int, GROUP_M: int, EPI_N: int, NBUF: int,
    MASKED: bool, REGS: int, **values: Any,
) -> None:  # fmt: skip
    rows, num_m, num_n = BLOCK_M // 2, cdiv(M, BLOCK_M), cdiv(K, BLOCK_N)
    dy, w, dh, a = (members(values, f"{name}_desc", MEMBERS) for name in ("dy", "w", "dh", "a"))
    words = members(values, "m_desc", MEMBERS if MASKED else 0)
    steps = [cdiv(n, BLOCK_K) for n in members(values, "N", MEMBERS)]
    assert max(BLOCK_H) <= BLOCK_K, "an extra step lies in a buffer of the ring"
    assert not MASKED or (BLOCK_N <= 128 and MEMBERS <= 3), "the terms have no room in registers"
    assert not MASKED or sum(steps) + sum(EXTRA) - max(EXTRA) + 1 >= STAGES, "a mask's buffer would be overwritten"

    def extra(i: int, m0: int, n0: int) -> Tensor:
        total, width = torch.zeros(rows, BLOCK_N), BLOCK_H[i]
        for j in range(EXTRA[i]):
            total += low_rank(dh[i], a[i], m0, n0, j % H_BLOCKS[i] * width, j * width, rows, BLOCK_N, width, False)
        return total

    for (program,) in shuffled(grid[0]):
        for t in range(program, num_m * num_n, grid[0]):
            tm, tn = tile_of(t, num_m, num_n, GROUP_M)
            for m0 in range(tm * BLOCK_M, (tm + 1) * BLOCK_M, rows):
                n0 = tn * BLOCK_N
                acc = torch.zeros(rows, BLOCK_N)
                for i in range(MEMBERS if MASKED else 0):
                    acc += masked(extra(i, m0, n0), load(words[i], m0, n0 // 32, [rows, BLOCK_N // 32]))
                for i in range(MEMBERS):
                    for k in range(steps[i]):
                        acc += main_step(dy[i], w[i], m0, n0, k * BLOCK_K, rows, BLOCK_N, BLOCK_K, False)
                for i in range(0 if MASKED else MEMBERS):
                    acc += extra(i, m0, n0)
                write_tile(acc, dx_desc, m0, n0, None, None, K, EPI_N)


def hopper_group_shrink_kernel(
    grid: Grid, *, x_desc: Any, counters: Tensor | None, keep16: int, M: int, K: int, BLOCK_M: int, BLOCK_K: int,
    RANKS: tuple[int, ...], LARGEST: int, TOTAL: int, MEMBERS: int, STAGES: int, SPLIT: int, DROP: bool, **values: Any,
) -> None:  # fmt: skip
    assert (max(RANKS), sum(RANKS)) == (LARGEST, TOTAL)
    all_steps = cdiv(K, BLOCK_K)
    each, width = cdiv(all_steps, SPLIT), 4 * cdiv(K, 128)
    a, hp, scales = (members(values, name, MEMBERS) for name in ("a_desc", "hp", "scale"))
    words = members(values, "words", MEMBERS if DROP else 0)
    parts = members(values, "part", MEMBERS if SPLIT > 1 else 0)
    drawn = []
    for seed in members(values, "seed", MEMBERS if DROP else 0, "_ptr"):
        assert 0 < keep16 < 65536
        bits = packed_keep_words(seed, grid[0] * BLOCK_M, K, 1 - keep16 / 65536)
        drawn.append(torch.nn.functional.pad(bits, (0, all_steps * BLOCK_K // 32 + 4 - width)))
    for block, share in shuffled(grid[0], grid[1]):
        m0, first = block * BLOCK_M, share * each
        accs = [torch.zeros(BLOCK_M, rank) for rank in RANKS]
        for k in range(first, max(first, min(all_steps, first + each))):
            loaded = load(x_desc, m0, k * BLOCK_K, [BLOCK_M, BLOCK_K])
            for i, rank in enumerate(RANKS):
                x = loaded
                if DROP:
                    columns = slice(k * BLOCK_K // 32, (k + 1) * BLOCK_K // 32)
                    bits = drawn[i][m0 : m0 + BLOCK_M, columns]
                    there = max(0, min(width, columns.stop) - columns.start)
                    put(words[i], m0 * width + columns.start, width, bits[:, :there], M - m0)
                    x = masked(x, bits)
                high = load(a[i], 0, k * BLOCK_K, [rank, BLOCK_K]).T
                low = load(a[i], 2 * rank, k * BLOCK_K, [rank, BLOCK_K]).T if x.dtype == torch.float16 else None
                accs[i] += by_parts(x, high, low)
        if SPLIT == 1:
            for i, rank in enumerate(RANKS):
                put_hi_lo(accs[i] * scales[i], hp[i], m0, M, rank, 2 * rank)
            continue
        assert counters is not None
        for i, rank in enumerate(RANKS):
            put(parts[i], (share * M + m0) * rank, rank, accs[i], M - m0)
        before = int(counters[block])
        counters[block] += 1
        if before == SPLIT - 1:
            for i, rank in enumerate(RANKS):
                total = flat(parts[i])[: SPLIT * M * rank].view(SPLIT, M, rank)[:, m0 : m0 + BLOCK_M].sum(0)
                put_hi_lo(total * scales[i], hp[i], m0, M, rank, 2 * rank)
            counters[block] = 0


def hopper_group_dh_db_kernel(
    grid: Grid, *, M: int, chunk: int, BLOCK_M: int, BLOCK_N: int, RANKS: tuple[int, ...], LARGEST: int, MEMBERS: int,
    STAGES: int, **values: Any,
) -> None:  # fmt: skip
    assert (max(RANKS), grid[2]) == (LARGEST, MEMBERS)
    dy, b, h = (members(values, f"{name}_desc", MEMBERS) for name in ("dy", "b", "h"))
    dh, db = (members(values, f"{name}_part", MEMBERS) for name in ("dh", "db"))
    for i, n in enumerate(members(values, "N", MEMBERS)):
        one.hopper_dh_db_kernel(
            (min(grid[0], cdiv(n, BLOCK_N)), grid[1], 1), dy_desc=dy[i], b_desc=b[i], h_desc=h[i], dh_part=dh[i],
            db_part=db[i], M=M, N=n, chunk=chunk, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=RANKS[i], LO=True,
            STAGES=STAGES,
        )  # fmt: skip


def hopper_group_da_kernel(
    grid: Grid, *, x_desc: Any, M: int, N: int, chunk: int, BLOCK_M: int, BLOCK_N: int, RANKS: tuple[int, ...],
    LARGEST: int, TOTAL: int, MEMBERS: int, MASKED: bool, STAGES: int, **values: Any,
) -> None:  # fmt: skip
    assert (max(RANKS), sum(RANKS)) == (LARGEST, TOTAL)
    h, parts = members(values, "h_desc", MEMBERS), members(values, "part", MEMBERS)
    words = members(values, "m_desc", MEMBERS) if MASKED else [None] * MEMBERS
    for i, rank in enumerate(RANKS):
        one.hopper_outer_kernel(
            grid, x_desc=x_desc, h_desc=h[i], m_desc=words[i], part=parts[i], M=M, N=N, chunk=chunk, BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N, BLOCK_R=rank, LO=True, MASKED=MASKED, STAGES=STAGES,
        )  # fmt: skip


def hopper_group_pack_kernel(
    grid: Grid, *, zeros: Tensor | None, K: int, count: int | None, RANK: tuple[int, ...], BLOCK_R: tuple[int, ...],
    STRIDE_H: tuple[int, ...], MEMBERS: int, SPLIT: bool, BLOCK: int, **values: Any,
) -> None:  # fmt: skip
    assert grid[1] == MEMBERS
    a, b, ap, bp, ns = (members(values, name, MEMBERS) for name in ("a", "b", "ap", "bp", "N"))
    for i in range(MEMBERS):
        assert a[i].is_contiguous() and b[i].is_contiguous()  # noqa: PT018
        one.hopper_pack_kernel(
            (grid[0], 1, 1), a=a[i], b=b[i], ap=ap[i], bp=bp[i], zeros=None if i else zeros, stride_ar=None,
            stride_ak=None, stride_bn=None, stride_br=None, K=K, N=ns[i], count=None if i else count, RANK=RANK[i],
            BLOCK_R=BLOCK_R[i], STRIDE_H=STRIDE_H[i], SPLIT=SPLIT, BLOCK=BLOCK,
        )  # fmt: skip


def hopper_group_reduce_dh_kernel(
    grid: Grid, *, M: int, PARTS: tuple[int, ...], BLOCK_R: tuple[int, ...], MEMBERS: int, BLOCK_M: int, **values: Any
) -> None:
    assert grid[1] == MEMBERS
    part, out, scale = (members(values, name, MEMBERS) for name in ("part", "out", "scale"))
    for i, rank in enumerate(BLOCK_R):
        one.hopper_reduce_dh_kernel(
            (grid[0], 1, 1), part=part[i], out=out[i], scale=scale[i], M=M, PARTS=PARTS[i], BLOCK_R=rank,
            STRIDE_H=2 * rank, BLOCK_M=BLOCK_M, PDL=False,
        )  # fmt: skip


def hopper_group_reduce_grads_kernel(
    grid: Grid, *, a_parts: int, b_parts: int, RANK: tuple[int, ...], BLOCK_R: tuple[int, ...], MEMBERS: int,
    BLOCK: int, **values: Any,
) -> None:  # fmt: skip
    assert grid[1] == MEMBERS
    names = ("a_part", "b_part", "da", "db", "K", "N")
    tensors = dict(zip(names, (members(values, name, MEMBERS) for name in names), strict=True))
    for i in range(MEMBERS):
        mine = {name: found[i] for name, found in tensors.items()}
        one.hopper_reduce_grads_kernel(
            (grid[0], 1, 1), **mine, a_parts=a_parts, b_parts=b_parts, RANK=RANK[i], BLOCK_R=BLOCK_R[i], BLOCK=BLOCK
        )


EMULATED.update(
    (function.__name__, function)
    for function in (
        hopper_group_product_kernel,
        hopper_group_dx_kernel,
        hopper_group_shrink_kernel,
        hopper_group_dh_db_kernel,
        hopper_group_da_kernel,
        hopper_group_pack_kernel,
        hopper_group_reduce_dh_kernel,
        hopper_group_reduce_grads_kernel,
    )
)
