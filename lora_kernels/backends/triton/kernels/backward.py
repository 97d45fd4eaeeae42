"""Backward kernels: the two-stage pair dh and db with dbias, da, and the second stage of what comes in parts."""

import triton
import triton.language as tl

from .common import as_adapter, dot_adapter, dot_hidden, load_operand, rounded
from .packed import keep_tile

__all__ = ["da_kernel", "dh_db_kernel", "reduce_kernel"]


@triton.jit(do_not_specialize=["M", "chunk_m"])
def dh_db_kernel(
    dy_ptr,
    lora_b_ptr,
    h_ptr,
    dh_parts_ptr,
    db_parts_ptr,
    dbias_parts_ptr,
    M,
    N,
    R: tl.constexpr,
    chunk_m,
    stride_dym,
    stride_dyn,
    stride_bn: tl.constexpr,
    stride_br: tl.constexpr,
    stride_hm: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OPERAND: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """First stage of dh = s dy B, db = s dyᵀ h and dbias = Σ_m dy in one read of dy; ``reduce_kernel`` is the second.

    dh_parts[j, m, r] = Σ_{n in block j} dy[m, n] B[n, r];  db_parts[i, n, r] = Σ_{m in chunk i} dy[m, n] h[m, r];
    dbias_parts[i, n] = Σ_{m in chunk i} dy[m, n].

    ============ ================================== ================================
    dy           (M, N)                             any strides, 0 too
    lora_b       (N, R)                             any strides, any float dtype
    h            (M, R) fp32                        rows in one piece, stride_hm apart; with OPERAND bf16 parts
    dh_parts     (ceil(N / BLOCK_N), M, R) fp32     contiguous
    db_parts     (ceil(M / chunk_m), N, R) fp32     contiguous
    dbias_parts  (ceil(M / chunk_m), N) fp32, None  contiguous; None: it is not due
    ============ ================================== ================================

    Grid (blocks of N, chunks of M, blocks of R); a chunk is a multiple of BLOCK_M rows. The block of B stays on chip,
    the sum for db stays in registers. fp32 accumulation, 4 M N R flops (6 with SPLIT); reads dy once for each BLOCK_R
    ranks, writes 4 R (M N / BLOCK_N + N M / chunk_m) bytes.
    """
    block_n = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    mask_r = offs_r < R
    b_ptrs = lora_b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
    b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # (BLOCK_N, BLOCK_R)
    b = as_adapter(b, dy_ptr.dtype.element_ty)
    db = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    first = chunk * chunk_m
    last = tl.minimum(first + chunk_m, M)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < last
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
        h_ptrs = h_ptr + offs_m[None, :] * stride_hm + offs_r[:, None]
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_M, BLOCK_N)
        h = load_operand(h_ptrs, mask_m[None, :] & mask_r[:, None], OPERAND)  # (BLOCK_R, BLOCK_M)
        dh = dot_adapter(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION)
        dh_ptrs = dh_parts_ptr + (block_n * M + offs_m)[:, None] * R + offs_r[None, :]
        tl.store(dh_ptrs, dh, mask=mask_m[:, None] & mask_r[None, :])
        db = dot_hidden(h, dy, db, dy.dtype, SPLIT, PRECISION)
        if dbias_parts_ptr is not None:
            dbias += tl.sum(dy.to(tl.float32), 0)
    db_ptrs = db_parts_ptr + (chunk * N + offs_n)[None, :] * R + offs_r[:, None]
    tl.store(db_ptrs, db, mask=mask_r[:, None] & mask_n[None, :])
    if dbias_parts_ptr is not None:
        if tl.program_id(2) == 0:
            tl.store(dbias_parts_ptr + chunk * N + offs_n, dbias, mask=mask_n)


@triton.jit
def _sum_of_parts(parts_ptr, out_ptr, scaling, pid, size, count, BLOCK: tl.constexpr):
    """out = scaling Σ_i parts[i] for the block ``pid``, in the order of i; nothing where there is no such block."""
    if (pid >= 0) & (pid < tl.cdiv(size, BLOCK)):
        offs = pid * BLOCK + tl.arange(0, BLOCK)
        mask = offs < size
        part_ptrs = parts_ptr + offs
        acc = tl.zeros((BLOCK,), tl.float32)
        for _ in range(count):
            acc += tl.load(part_ptrs, mask=mask, other=0.0)  # (BLOCK,)
            part_ptrs += size
        tl.store(out_ptr + offs, rounded(acc * scaling, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_count", "count"])
def reduce_kernel(
    first_parts_ptr,
    second_parts_ptr,
    sums_parts_ptr,
    first_ptr,
    second_ptr,
    sums_ptr,
    scaling,
    first_size,
    second_size,
    sums_size,
    first_count,
    count,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Second stage: first = scaling Σ_j first_parts[j], second = scaling Σ_i second_parts[i], sums = Σ_i sums_parts[i].

    Without SCALED ``second`` is the sum as it is: s is in it.

    ============= ============================== ===========================
    first_parts   (first_count, first_size) fp32 contiguous; None with first
    second_parts  (count, second_size) fp32      contiguous; None with second
    sums_parts    (count, sums_size) fp32        contiguous; None with sums
    first         (first_size,) any float        contiguous; None: not due
    second        (second_size,) any float       contiguous; None: not due
    sums          (sums_size,) any float         contiguous; None: not due
    ============= ============================== ===========================

    Grid (Σ ceil(size / BLOCK)): the first programs sum ``first``, the next ``second``, the last ``sums``. Parts are
    added in their order, in fp32; reads them, writes the results. What is not due has size 0.
    """
    pid = tl.program_id(0).to(tl.int64)
    if first_ptr is not None:
        _sum_of_parts(first_parts_ptr, first_ptr, scaling, pid, first_size, first_count, BLOCK)
        pid -= tl.cdiv(first_size, BLOCK)
    if second_ptr is not None:
        _sum_of_parts(second_parts_ptr, second_ptr, scaling if SCALED else 1.0, pid, second_size, count, BLOCK)
        pid -= tl.cdiv(second_size, BLOCK)
    if sums_ptr is not None:
        _sum_of_parts(sums_parts_ptr, sums_ptr, 1.0, pid, sums_size, count, BLOCK)


@triton.jit(do_not_specialize=["M", "chunk_m"])
def da_kernel(
    dh_ptr,
    x_ptr,
    words_ptr,
    da_ptr,
    scale,
    M,
    K,
    R: tl.constexpr,
    chunk_m,
    stride_dhm: tl.constexpr,
    stride_xm,
    stride_xk,
    stride_dar,
    stride_dak,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OPERAND: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """da = scale dhᵀ (x * keep), with scale = 1 / (1 - p). As dbᵀ = scale hᵀ dy: dh = h, x = dy, scale = s, no words.

    ===== ============================ =================================================
    dh    (M, R) fp32                  rows in one piece, stride_dhm apart; with OPERAND bf16 parts
    x     (M, K)                       any strides, 0 too
    words (M, 4 ceil(K / 128)) int32   ``packed_mask``; None: nothing is dropped
    da    (R, K) any float, by strides one for each chunk of rows; their sum is meant
    ===== ============================ =================================================

    Grid (ceil(K / BLOCK_K), ceil(R / BLOCK_R), ceil(M / chunk_m)): each program walks its chunk of rows. Chunks are for
    a K whose blocks alone leave multiprocessors idle: then da is fp32 and ``reduce_kernel`` the second stage. fp32
    accumulation, 2 M K R flops (4 with SPLIT); reads x once for each BLOCK_R ranks, dh from L2, writes da.
    """
    first_column = tl.program_id(0) * BLOCK_K
    offs_k = first_column.to(tl.int64) + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    chunk = tl.program_id(2)
    mask_k = offs_k < K
    mask_r = offs_r < R
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    first = chunk * chunk_m
    last = tl.minimum(first + chunk_m, M)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < last
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        dh_ptrs = dh_ptr + offs_m[None, :] * stride_dhm + offs_r[:, None]
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        dh = load_operand(dh_ptrs, mask_m[None, :] & mask_r[:, None], OPERAND)  # (BLOCK_R, BLOCK_M)
        if words_ptr is not None:
            x = x * keep_tile(words_ptr, offs_m, first_column, mask_m, K, BLOCK_K).to(x.dtype)
        acc = dot_hidden(dh, x, acc, x.dtype, SPLIT, PRECISION)
    da_ptrs = da_ptr + offs_r[:, None] * stride_dar + offs_k[None, :] * stride_dak
    da_ptrs += chunk.to(tl.int64) * K * R
    tl.store(da_ptrs, rounded(acc * scale, da_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_k[None, :])
