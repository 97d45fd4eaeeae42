"""The Gluon kernels of ``kernels/hopper`` in PyTorch, with the same arguments: their launches run without a GPU.

Each function does what the device code does, program by program and tile by tile, through the descriptors' addresses,
strides and blocks and the pointers' offsets. So a wrong grid, stride, block, workspace, chunk or count shows as wrong
numbers. Programs run in random order; those that wait for others take turns, and a wait without end is an error.
Products are fp32's. What is not emulated: buffers, barriers, registers.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_kernels.packed_mask import packed_keep_words, unpack

__all__ = ["EMULATED", "run_launch"]

Grid = tuple[int, int, int]


def run_launch(launch: Any, stream: int | None, *arguments: Any) -> None:
    """In the place of ``prepared.Launch.__call__``: binds the arguments as Triton does, and runs the emulation."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, (*arguments, *launch.static), strict=True))
    EMULATED[getattr(kernel, "fn", kernel).__name__](launch.grid, **values)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def shuffled(*sizes: int) -> list[tuple[int, ...]]:
    """All programs of a grid, in random order."""
    programs = [
        tuple(index)
        for index in torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, len(sizes)).tolist()
    ]
    random.Random(1).shuffle(programs)
    return programs


# ---- memory: by descriptors and by pointers


def memory(desc: Any) -> Tensor:
    """What a descriptor describes, from its address."""
    (rows, columns), (stride, one) = desc.shape, desc.strides
    dtype = desc.base.dtype
    assert one == 1
    assert rows == 1 or stride * dtype.itemsize % 16 == 0
    assert desc.base.data_ptr() % 16 == 0
    assert desc.block_shape[1] * dtype.itemsize % 16 == 0
    bytes_ = ((rows - 1) * stride + columns) * dtype.itemsize
    buffer = (ctypes.c_char * bytes_).from_address(desc.base.data_ptr())
    return torch.frombuffer(buffer, dtype=dtype).as_strided((rows, columns), (stride, 1))


def load(desc: Any, row: int, column: int, block: list[int]) -> Tensor:
    """One block; zeros outside of the tensor. The kernel's buffer has to have the descriptor's block."""
    assert list(desc.block_shape) == block, f"a block {list(desc.block_shape)} for a buffer {block}"
    there = memory(desc)[row : row + block[0], column : column + block[1]]
    found = torch.zeros(block, dtype=there.dtype)
    found[: there.shape[0], : there.shape[1]] = there
    return found


def store(desc: Any, row: int, column: int, value: Tensor) -> None:
    assert list(desc.block_shape) == list(value.shape), f"a block {list(desc.block_shape)} for {list(value.shape)}"
    to = memory(desc)[row : row + value.shape[0], column : column + value.shape[1]]
    to.copy_(value[: to.shape[0], : to.shape[1]])


def flat(tensor: Tensor) -> Tensor:
    """What a pointer points to; an offset beyond it is an error."""
    assert tensor.is_contiguous()
    return tensor.view(-1)


def put(to: Tensor, first: int, stride: int, value: Tensor, rows: int) -> None:
    """Rows of ``value``, ``stride`` apart from ``first`` on, as far as there are ``rows``."""
    at = first + stride * torch.arange(value.shape[0])[:, None] + torch.arange(value.shape[1])[None, :]
    there = max(0, min(rows, value.shape[0]))
    flat(to)[at[:there]] = value[:there].to(to.dtype)


def put_hi_lo(h: Tensor, hp: Tensor, row: int, M: int, BLOCK_R: int, STRIDE_H: int) -> None:
    hi = h.to(torch.bfloat16)
    put(hp, row * STRIDE_H, STRIDE_H, hi, M - row)
    if STRIDE_H >= 2 * BLOCK_R:
        put(hp, row * STRIDE_H + BLOCK_R, STRIDE_H, h - hi.float(), M - row)


def product(left: Tensor, right: Tensor) -> Tensor:
    assert left.dtype == right.dtype, "one instruction's operands have one type"
    return left.float() @ right.float()


def by_parts(left: Tensor, high: Tensor, low: Tensor | None) -> Tensor:
    """left (high + low), bf16 parts; an fp16 ``left`` is split likewise, and its low part multiplies ``high`` alone."""
    if left.dtype == torch.bfloat16:
        return product(left, high) if low is None else product(left, high) + product(left, low)
    assert low is not None
    left_high = left.to(torch.bfloat16)
    left_low = (left.float() - left_high.float()).to(torch.bfloat16)
    return product(left_high, high) + product(left_low, high) + product(left_high, low)


def masked(t: Tensor, words: Tensor) -> Tensor:
    return torch.where(unpack(words, t.shape[1]), t, torch.zeros_like(t))


# ---- y and dx


def tile_of(t: int, num_m: int, num_n: int, GROUP_M: int) -> tuple[int, int]:
    per_group = GROUP_M * num_n
    first = t // per_group * GROUP_M
    rows = min(num_m - first, GROUP_M)
    inside = t % per_group
    return first + inside % rows, inside // rows


def write_tile(
    acc: Tensor, y_desc: Any, row: int, column: int, gain: Tensor | None, bias: Tensor | None, N: int, EPI_N: int
) -> None:
    wide = min(acc.shape[1], max(0, N - column))
    for vector, combine in ((gain, torch.mul), (bias, torch.add)):
        if vector is not None:
            acc[:, :wide] = combine(acc[:, :wide], vector[column : column + wide].float())
    for first in range(0, acc.shape[1], EPI_N):
        store(y_desc, row, column + first, acc[:, first : first + EPI_N].to(y_desc.base.dtype))


def hopper_product_kernel(
    grid: Grid, *, x_desc: Any, w_desc: Any, h_desc: Any, b_desc: Any, m_desc: Any, y_desc: Any, gain_ptr: Any,
    bias_ptr: Any, M: int, N: int, K: int, BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, BLOCK_H: int, H_BLOCKS: int,
    EXTRA: int, MODE: str, TRANS_W: bool, STAGES: int, GROUP_M: int, EPI_N: int, NBUF: int, PDL: bool, MASKED: bool,
    REGS: int,
) -> None:  # fmt: skip
    rows = BLOCK_M // (2 if MODE == "split" else 1)
    num_m, num_n, steps = cdiv(M, BLOCK_M), cdiv(N, BLOCK_N), cdiv(K, BLOCK_K)
    assert BLOCK_H <= BLOCK_K, "an extra step lies in a buffer of the ring"
    assert not MASKED or steps >= STAGES - 1, "the mask's one buffer would be overwritten"

    def extra(m0: int, n0: int) -> Tensor:
        total = torch.zeros(rows, BLOCK_N)
        for j in range(EXTRA):
            total += low_rank(
                h_desc, b_desc, m0, n0, j % H_BLOCKS * BLOCK_H, j * BLOCK_H, rows, BLOCK_N, BLOCK_H, TRANS_W
            )
        return total

    for (program,) in shuffled(grid[0]):
        for t in range(program, num_m * num_n, grid[0]):
            tm, tn = tile_of(t, num_m, num_n, GROUP_M)
            for m0 in range(tm * BLOCK_M, (tm + 1) * BLOCK_M, rows):
                n0 = tn * BLOCK_N
                acc = torch.zeros(rows, BLOCK_N)
                if MASKED:
                    acc = masked(extra(m0, n0), load(m_desc, m0, n0 // 32, [rows, BLOCK_N // 32]))
                for k in range(steps):
                    acc += main_step(x_desc, w_desc, m0, n0, k * BLOCK_K, rows, BLOCK_N, BLOCK_K, TRANS_W)
                if not MASKED:
                    acc += extra(m0, n0)
                write_tile(acc, y_desc, m0, n0, gain_ptr, bias_ptr, N, EPI_N)


def main_step(
    x_desc: Any, w_desc: Any, m0: int, n0: int, k0: int, rows: int, BLOCK_N: int, BLOCK_K: int, TRANS_W: bool
) -> Tensor:
    x = load(x_desc, m0, k0, [rows, BLOCK_K])
    return product(
        x, load(w_desc, n0, k0, [BLOCK_N, BLOCK_K]).T if TRANS_W else load(w_desc, k0, n0, [BLOCK_K, BLOCK_N])
    )


def low_rank(
    h_desc: Any, b_desc: Any, m0: int, n0: int, h0: int, b0: int, rows: int, BLOCK_N: int, BLOCK_H: int, TRANS_W: bool
) -> Tensor:
    h = load(h_desc, m0, h0, [rows, BLOCK_H])
    return product(
        h, load(b_desc, n0, b0, [BLOCK_N, BLOCK_H]).T if TRANS_W else load(b_desc, b0, n0, [BLOCK_H, BLOCK_N])
    )


def hopper_product_h_kernel(
    grid: Grid, *, x_desc: Any, w_desc: Any, a_desc: Any, h_desc: Any, b_desc: Any, y_desc: Any, hp: Tensor, half:
    Tensor | None, flags: Tensor, gain_ptr: Any, bias_ptr: Any, scale: float, M: int, N: int, K: int, BLOCK_M: int,
    BLOCK_N: int, BLOCK_K: int, BLOCK_R: int, BLOCK_H: int, EXTRA: int, TRANS_W: bool, STAGES: int, GROUP_M: int,
    EPI_N: int, NBUF: int, REGS: int,
) -> None:  # fmt: skip
    rows, num_m, num_n, steps = BLOCK_M // 2, cdiv(M, BLOCK_M), cdiv(N, BLOCK_N), cdiv(K, BLOCK_K)
    assert num_n >= 2, "each half of h is a tile's"
    assert steps >= 4, "each half of h takes two steps or more"
    flags, published = flat(flags), 2 if half is not None else 4
    assert int(flags.abs().sum()) == 0, "flags start at zero"

    def publish(part: Tensor, tm: int, tn: int, which: int) -> None:
        m0 = tm * BLOCK_M + which * rows
        if half is None:
            put(hp, m0 * BLOCK_H * EXTRA + tn * BLOCK_R, BLOCK_H * EXTRA, part * scale, M - m0)
            flags[tm] += 1
            return
        put(half, tn * M * BLOCK_R + m0 * BLOCK_R, BLOCK_R, part, M - m0)
        meeting = num_m + 1 + 2 * tm + which
        before = int(flags[meeting])
        flags[meeting] += 1
        if before == 1:
            there = max(0, min(rows, M - m0))
            first = (1 - tn) * M * BLOCK_R + m0 * BLOCK_R
            other = torch.zeros(rows, BLOCK_R)
            other[:there] = flat(half)[first : first + there * BLOCK_R].view(there, BLOCK_R)
            put_hi_lo((part + other) * scale, hp, m0, M, BLOCK_R, BLOCK_H * EXTRA)
            flags[tm] += 1

    def tile(t: int) -> Iterator[int]:
        gm, gn = tile_of(max(t - 2 * num_m, 0), num_m, max(num_n - 2, 1), GROUP_M)
        tm, tn = (t // 2, t % 2) if t < 2 * num_m else (gm, gn + 2)
        begin, mine = (steps // 2 if tn == 1 else 0), {0: steps // 2, 1: steps - steps // 2}.get(tn, 0)
        accs = [torch.zeros(rows, BLOCK_N) for _ in range(2)]
        parts = [torch.zeros(rows, BLOCK_R) for _ in range(2)]
        for k in range(steps):
            k0 = (k + begin) % steps * BLOCK_K
            for which in range(2):
                m0 = tm * BLOCK_M + which * rows
                accs[which] += main_step(x_desc, w_desc, m0, tn * BLOCK_N, k0, rows, BLOCK_N, BLOCK_K, TRANS_W)
                if k < mine:
                    parts[which] += main_step(x_desc, a_desc, m0, 0, k0, rows, BLOCK_R, BLOCK_K, TRANS_W)
                if k == mine - 1:
                    publish(parts[which], tm, tn, which)
        while flags[tm] < published:
            yield t + 1
        for which in range(2):
            m0 = tm * BLOCK_M + which * rows
            for j in range(EXTRA):
                accs[which] += low_rank(
                    h_desc, b_desc, m0, tn * BLOCK_N, j * BLOCK_H, j * BLOCK_H, rows, BLOCK_N, BLOCK_H, TRANS_W
                )
            write_tile(accs[which], y_desc, m0, tn * BLOCK_N, gain_ptr, bias_ptr, N, EPI_N)

    def program(number: int) -> Iterator[int]:
        for t in range(number, num_m * num_n, grid[0]):
            yield from tile(t)
        flags[num_m] += 1
        if flags[num_m] == grid[0]:
            flags[: (3 * num_m if half is not None else num_m) + 1] = 0

    take_turns([program(number) for (number,) in shuffled(grid[0])])


def take_turns(programs: list[Iterator[int]]) -> None:
    """Runs all at once, each until it waits and tells what it has done so far; a round of waiting alone is an error."""
    before: list[int] = []
    while programs:
        told = [(program, next(program, None)) for program in programs]
        programs = [program for program, done in told if done is not None]
        now = [done for _, done in told if done is not None]
        assert now != before, "every program waits for another"
        before = now


# ---- what is narrow


def hopper_shrink_kernel(
    grid: Grid, *, x_desc: Any, a_desc: Any, words: Tensor | None, hp: Tensor, part: Tensor | None, counters: Tensor |
    None, scale: float, keep16: int, seed0: None, seed1: None, offset: None, seed_ptr: Tensor | None, M: int, K: int,
    BLOCK_M: int, BLOCK_K: int, BLOCK_R: int, STRIDE_H: int, STAGES: int, SPLIT: int, DROP: bool, BY_ROW: bool, CALLS:
    int, ROUNDS: int,
) -> None:  # fmt: skip
    all_steps = cdiv(K, BLOCK_K)
    each, width = cdiv(all_steps, SPLIT), 4 * cdiv(K, 128)
    drawn = torch.empty(0)
    if DROP:
        assert seed_ptr is not None
        assert 0 < keep16 < 65536
        drawn = packed_keep_words(seed_ptr, grid[0] * BLOCK_M, all_steps * BLOCK_K, 1 - keep16 / 65536)
        spare = packed_keep_words(seed_ptr, grid[0] * BLOCK_M, K, 1 - keep16 / 65536)
        drawn[:, :] = torch.nn.functional.pad(spare, (0, drawn.shape[1] - width))
    for block, share in shuffled(grid[0], grid[1]):
        m0, first = block * BLOCK_M, share * each
        acc = torch.zeros(BLOCK_M, BLOCK_R)
        for k in range(first, max(first, min(all_steps, first + each))):
            x = load(x_desc, m0, k * BLOCK_K, [BLOCK_M, BLOCK_K])
            if DROP:
                columns = slice(k * BLOCK_K // 32, (k + 1) * BLOCK_K // 32)
                bits = drawn[m0 : m0 + BLOCK_M, columns]
                there = max(0, min(width, columns.stop) - columns.start)
                put(words, m0 * width + columns.start, width, bits[:, :there], M - m0)
                x = masked(x, bits)

            def adapter(place: int, k0: int = k * BLOCK_K) -> Tensor:
                if BY_ROW:
                    return load(a_desc, place, k0, [BLOCK_R, BLOCK_K]).T
                return load(a_desc, k0, place, [BLOCK_K, BLOCK_R])

            acc += by_parts(x, adapter(0), adapter(2 * BLOCK_R) if x.dtype == torch.float16 else None)
        if SPLIT == 1:
            put_hi_lo(acc * scale, hp, m0, M, BLOCK_R, STRIDE_H)
            continue
        put(part, (share * M + m0) * BLOCK_R, BLOCK_R, acc, M - m0)
        before = int(counters[block])
        counters[block] += 1
        if before == SPLIT - 1:
            parts = flat(part)[: SPLIT * M * BLOCK_R].view(SPLIT, M, BLOCK_R)[:, m0 : m0 + BLOCK_M]
            put_hi_lo(parts.sum(0) * scale, hp, m0, M, BLOCK_R, STRIDE_H)
            counters[block] = 0


def hopper_dh_db_kernel(
    grid: Grid, *, dy_desc: Any, b_desc: Any, h_desc: Any, dh_part: Tensor, db_part: Tensor, M: int, N: int, chunk:
    int, BLOCK_M: int, BLOCK_N: int, BLOCK_R: int, LO: bool, STAGES: int,
) -> None:  # fmt: skip
    for column, row in shuffled(grid[0], grid[1]):
        n0, block0 = column * BLOCK_N, row * chunk
        wide = dy_desc.base.dtype == torch.float16
        b = load(b_desc, n0, 0, [BLOCK_N, BLOCK_R])
        b_low = load(b_desc, n0, 2 * BLOCK_R, [BLOCK_N, BLOCK_R]) if wide else None
        db = torch.zeros(BLOCK_N, BLOCK_R)
        for m0 in range(block0 * BLOCK_M, min(cdiv(M, BLOCK_M), block0 + chunk) * BLOCK_M, BLOCK_M):
            dy = load(dy_desc, m0, n0, [BLOCK_M, BLOCK_N])
            put(dh_part, (column * M + m0) * BLOCK_R, BLOCK_R, by_parts(dy, b, b_low), M - m0)
            high, low = (load(h_desc, m0, part * BLOCK_R, [BLOCK_M, BLOCK_R]) for part in range(2))
            db += by_parts(dy.T, high, low if LO else None)
        put(db_part, (row * N + n0) * BLOCK_R, BLOCK_R, db, N - n0)


def hopper_outer_kernel(
    grid: Grid, *, x_desc: Any, h_desc: Any, m_desc: Any, part: Tensor, M: int, N: int, chunk: int, BLOCK_M: int,
    BLOCK_N: int, BLOCK_R: int, LO: bool, MASKED: bool, STAGES: int,
) -> None:  # fmt: skip
    for column, row in shuffled(grid[0], grid[1]):
        n0, block0 = column * BLOCK_N, row * chunk
        acc = torch.zeros(BLOCK_N, BLOCK_R)
        for m0 in range(block0 * BLOCK_M, min(cdiv(M, BLOCK_M), block0 + chunk) * BLOCK_M, BLOCK_M):
            x = load(x_desc, m0, n0, [BLOCK_M, BLOCK_N])
            if MASKED:
                x = masked(x, load(m_desc, m0, n0 // 32, [BLOCK_M, BLOCK_N // 32]))
            high, low = (load(h_desc, m0, part * BLOCK_R, [BLOCK_M, BLOCK_R]) for part in range(2))
            acc += by_parts(x.T, high, low if LO else None)
        put(part, (row * N + n0) * BLOCK_R, BLOCK_R, acc, N - n0)


def hopper_pack_kernel(
    grid: Grid, *, a: Tensor, b: Tensor, ap: Tensor, bp: Tensor, zeros: Tensor | None, stride_ar: Any, stride_ak: Any,
    stride_bn: Any, stride_br: Any, K: int, N: int, count: int | None, RANK: int, BLOCK_R: int, STRIDE_H: int, SPLIT:
    bool, BLOCK: int,
) -> None:  # fmt: skip
    a_strides = (K, 1) if stride_ar is None else (stride_ar, stride_ak)
    b_strides = (RANK, 1) if stride_br is None else (stride_bn, stride_br)
    a_rows, b_rows = a.as_strided((RANK, K), a_strides), b.as_strided((N, RANK), b_strides)
    if zeros is not None:
        flat(zeros)[:count] = 0

    def repeated(part: Tensor) -> Tensor:
        part = torch.nn.functional.pad(part.float(), (0, 0, 0, BLOCK_R - RANK))
        hi = part.to(torch.bfloat16)
        repeats = [hi, hi, *([(part - hi.float()).to(torch.bfloat16)] * 2 if SPLIT else [])]
        return torch.cat(repeats)[:STRIDE_H]

    for (i,) in shuffled(grid[0]):
        if i < cdiv(K, BLOCK):
            columns = slice(i * BLOCK, min(K, (i + 1) * BLOCK))
            flat(ap).view(STRIDE_H, K)[:, columns] = repeated(a_rows[:, columns])
        else:
            rows = slice((i - cdiv(K, BLOCK)) * BLOCK, min(N, (i - cdiv(K, BLOCK) + 1) * BLOCK))
            flat(bp).view(N, STRIDE_H)[rows] = repeated(b_rows[rows].T).T


def hopper_reduce_dh_kernel(
    grid: Grid, *, part: Tensor, out: Tensor, scale: float, M: int, PARTS: int, BLOCK_R: int, STRIDE_H: int, BLOCK_M:
    int, PDL: bool,
) -> None:  # fmt: skip
    for (i,) in shuffled(grid[0]):
        total = flat(part)[: PARTS * M * BLOCK_R].view(PARTS, M, BLOCK_R)[:, i * BLOCK_M : (i + 1) * BLOCK_M].sum(0)
        put_hi_lo(total * scale, out, i * BLOCK_M, M, BLOCK_R, STRIDE_H)


def hopper_reduce_grads_kernel(
    grid: Grid, *, a_part: Tensor, b_part: Tensor, da: Tensor, db: Tensor, K: int, N: int, a_parts: int, b_parts: int,
    RANK: int, BLOCK_R: int, BLOCK: int,
) -> None:  # fmt: skip
    for (i,) in shuffled(grid[0]):
        if i < cdiv(K, BLOCK):
            k = slice(i * BLOCK, min(K, (i + 1) * BLOCK))
            total = flat(a_part)[: a_parts * K * BLOCK_R].view(a_parts, K, BLOCK_R)[:, k].sum(0)
            flat(da).view(RANK, K)[:, k] = total.T[:RANK].to(da.dtype)
        else:
            n = slice((i - cdiv(K, BLOCK)) * BLOCK, min(N, (i - cdiv(K, BLOCK) + 1) * BLOCK))
            total = flat(b_part)[: b_parts * N * BLOCK_R].view(b_parts, N, BLOCK_R)[:, n].sum(0)
            flat(db).view(N, RANK)[n] = total[:, :RANK].to(db.dtype)


def hopper_plain_shrink_kernel(
    grid: Grid, *, x: Tensor, a: Tensor, hp: Tensor, s: float, M: int, K: int, stride_xm: int | None, stride_r: int,
    BLOCK_R: int, STRIDE_H: int, BLOCK_M: int, BLOCK_K: int,
) -> None:  # fmt: skip
    assert K % BLOCK_K == 0, "columns are loaded without a mask"
    rows = x.as_strided((M, K), (K if stride_xm is None else stride_xm, 1))
    adapter = a.as_strided((BLOCK_R, K), (stride_r, 1))
    for (i,) in shuffled(grid[0]):
        block = rows[i * BLOCK_M : (i + 1) * BLOCK_M]
        put_hi_lo(product(block, adapter.T) * s, hp, i * BLOCK_M, M, BLOCK_R, STRIDE_H)


EMULATED: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        hopper_product_kernel,
        hopper_product_h_kernel,
        hopper_shrink_kernel,
        hopper_dh_db_kernel,
        hopper_outer_kernel,
        hopper_pack_kernel,
        hopper_reduce_dh_kernel,
        hopper_reduce_grads_kernel,
        hopper_plain_shrink_kernel,
    )
}
