"""What is small beside the products, in plain Triton: adapters' operands, sums of parts, a shrink without TMA."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

__all__ = [
    "hopper_pack_kernel",
    "hopper_plain_shrink_kernel",
    "hopper_reduce_dh_kernel",
    "hopper_reduce_grads_kernel",
]


@triton.jit
def _part_of(v, column, FIRST_LOW: tl.constexpr, SPLIT: tl.constexpr):
    """v as bf16. SPLIT: the low part in the columns from FIRST_LOW on."""
    hi = v.to(tl.bfloat16)
    if SPLIT:
        hi = tl.where(column < FIRST_LOW, hi, (v - hi.to(tl.float32)).to(tl.bfloat16))
    return hi


@triton.jit
def _there(r, TIMES: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Which of the operand's columns have a column of the adapter."""
    there = r < TIMES * BLOCK_R
    if RANK != BLOCK_R:
        there = there & (r % BLOCK_R < RANK)
    return there


@triton.jit
def hopper_pack_kernel(
    a,
    b,
    ap,
    bp,
    zeros,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    K,
    N,
    count,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STRIDE_H: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The operands of A and B: ap[c] = A[c mod BLOCK_R] and bp[:, c] = B[:, c mod BLOCK_R], as bf16; zero from RANK on.

    ====== =============================== =========================================================================
    a      (RANK, K)                       any strides (None: contiguous), any float dtype
    b      (N, RANK)                       the same
    ap     (STRIDE_H, K) bf16              contiguous
    bp     (N, STRIDE_H) bf16              contiguous
    zeros  (count,) int32, or None         set to zero: the counters and flags of this call's other kernels
    ====== =============================== =========================================================================

    Both repeats are there where STRIDE_H is at least 2 BLOCK_R, for h's high and its low part. SPLIT (fp16): two
    more, of the low parts. Grid (ceil(K / BLOCK) + ceil(N / BLOCK),), a block of columns of A or of rows of B each;
    the first also zeroes. Reads RANK (K + N) numbers, writes 2 STRIDE_H (K + N) bytes.

    Measured on an H100: contiguous fp32, RANK = BLOCK_R = 16, zeros None, not SPLIT (as many instructions; the order of
    a few differs). Not measured yet: the others.
    """
    i = tl.program_id(0)
    na = tl.cdiv(K, BLOCK)
    r = tl.arange(0, STRIDE_H)
    TIMES: tl.constexpr = (4 if SPLIT else 2) if STRIDE_H >= 2 * BLOCK_R else 1
    if zeros is not None:
        if i == 0:
            for first in range(0, count, 1024):
                at = first + tl.arange(0, 1024)
                tl.store(zeros + at, tl.zeros([1024], tl.int32), mask=at < count)
    if i < na:
        k = i * BLOCK + tl.arange(0, BLOCK)
        if stride_ar is None:
            a_ptrs = a + (r % BLOCK_R)[:, None] * K + k[None, :]
        else:
            a_ptrs = a + (r % BLOCK_R)[:, None] * stride_ar + k.to(tl.int64)[None, :] * stride_ak
        v = tl.load(
            a_ptrs, mask=_there(r, TIMES, RANK, BLOCK_R)[:, None] & (k < K)[None, :], other=0.0
        )  # (STRIDE_H, BLOCK)
        tl.store(ap + r[:, None] * K + k[None, :], _part_of(v, r[:, None], 2 * BLOCK_R, SPLIT), mask=(k < K)[None, :])
    else:
        n = (i - na) * BLOCK + tl.arange(0, BLOCK)
        if stride_br is None:
            b_ptrs = b + n[:, None] * RANK + (r % BLOCK_R)[None, :]
        else:
            b_ptrs = b + n.to(tl.int64)[:, None] * stride_bn + (r % BLOCK_R)[None, :] * stride_br
        u = tl.load(
            b_ptrs, mask=(n < N)[:, None] & _there(r, TIMES, RANK, BLOCK_R)[None, :], other=0.0
        )  # (BLOCK, STRIDE_H)
        tl.store(
            bp + n[:, None] * STRIDE_H + r[None, :], _part_of(u, r[None, :], 2 * BLOCK_R, SPLIT), mask=(n < N)[:, None]
        )


@triton.jit
def hopper_reduce_dh_kernel(
    part,
    out,
    scale,
    M,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STRIDE_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = high and low part of scale times the sum of the parts, in order.

    ====== =============================== ============
    part   (PARTS, M, BLOCK_R) fp32        contiguous
    out    (M, STRIDE_H) bf16              contiguous
    ====== =============================== ============

    Grid (ceil(M / BLOCK_M),). fp32; reads 4 PARTS M BLOCK_R bytes, writes 4 M BLOCK_R. PDL: a dx that was launched to
    wait for it may start. Measured on an H100 with PDL and BLOCK_R = 16.
    """
    if PDL:
        gdc_launch_dependents()  # only matters to a dx launched with PDL, which waits before it reads out
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    at = m[:, None] * BLOCK_R + r[None, :]
    inside = (m < M)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for p in tl.static_range(PARTS):
        acc += tl.load(part + p * (M * BLOCK_R) + at, mask=inside, other=0.0)
    acc *= scale
    hi = acc.to(tl.bfloat16)
    to = out + m[:, None] * STRIDE_H + r[None, :]
    tl.store(to, hi, mask=inside)
    if STRIDE_H >= 2 * BLOCK_R:
        tl.store(to + BLOCK_R, (acc - hi.to(tl.float32)).to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["a_parts", "b_parts"])
def hopper_reduce_grads_kernel(
    a_part, b_part, da, db, K, N, a_parts, b_parts, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr
):
    """da (RANK, K) = the sum of a_part, turned; db (N, RANK) = the sum of b_part; in order.

    ====== =============================== ============================================
    a_part (a_parts, K, BLOCK_R) fp32      contiguous
    b_part (b_parts, N, BLOCK_R) fp32      contiguous
    da     (RANK, K)                       contiguous, any float dtype
    db     (N, RANK)                       contiguous, any float dtype
    ====== =============================== ============================================

    Grid (ceil(K / BLOCK) + ceil(N / BLOCK),); K or N is 0 where that gradient is not due. fp32, rounded once.
    Measured on an H100 with RANK = BLOCK_R = 16 and fp32 gradients.
    """
    i = tl.program_id(0)
    na = tl.cdiv(K, BLOCK)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    if i < na:
        k = i * BLOCK + tl.arange(0, BLOCK)
        at = k[:, None] * BLOCK_R + r[None, :]
        for p in range(a_parts):
            acc += tl.load(a_part + p * (K * BLOCK_R) + at, mask=(k < K)[:, None], other=0.0)
        if RANK == BLOCK_R:
            tl.store(da + r[:, None] * K + k[None, :], tl.trans(acc), mask=(k < K)[None, :])
        else:
            tl.store(da + r[:, None] * K + k[None, :], tl.trans(acc), mask=(r < RANK)[:, None] & (k < K)[None, :])
    else:
        n = (i - na) * BLOCK + tl.arange(0, BLOCK)
        at = n[:, None] * BLOCK_R + r[None, :]
        for p in range(b_parts):
            acc += tl.load(b_part + p * (N * BLOCK_R) + at, mask=(n < N)[:, None], other=0.0)
        if RANK == BLOCK_R:
            tl.store(db + at, acc, mask=(n < N)[:, None])
        else:
            tl.store(db + n[:, None] * RANK + r[None, :], acc, mask=(n < N)[:, None] & (r < RANK)[None, :])


@triton.jit
def hopper_plain_shrink_kernel(
    x,
    a,
    hp,
    s,
    M,
    K,
    stride_xm,
    stride_r,
    BLOCK_R: tl.constexpr,
    STRIDE_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hp = high and low part of s * x Aᵀ, without dropout; loads by pointers.

    ====== =============================== =========================================================================
    x      (M, K) bf16                     rows in one piece, stride_xm apart (None: K); K is a multiple of BLOCK_K
    a      (>= R, K) bf16                  A's operand: rows in one piece, stride_r apart; the first BLOCK_R are read
    hp     (M, STRIDE_H) bf16              contiguous
    ====== =============================== =========================================================================

    Grid (ceil(M / BLOCK_M),). fp32 accumulator; 2 M K R flops; reads x once. Measured on an H100 with BLOCK_R = 16
    and stride_xm None.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    inside = rows[:, None] < M
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if stride_xm is None:
        xp = x + rows[:, None].to(tl.int64) * K + ks[None, :]
    else:
        xp = x + rows[:, None].to(tl.int64) * stride_xm + ks[None, :]
    ap = a + ks[:, None] + cols[None, :] * stride_r
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(xp, mask=inside, other=0.0), tl.load(ap), acc)
        xp += BLOCK_K
        ap += BLOCK_K
    acc *= s
    hi = acc.to(hp.dtype.element_ty)
    to = hp + rows[:, None] * STRIDE_H + cols[None, :]
    tl.store(to, hi, mask=inside)
    if STRIDE_H >= 2 * BLOCK_R:
        tl.store(to + BLOCK_R, (acc - hi.to(tl.float32)).to(hp.dtype.element_ty), mask=inside)
