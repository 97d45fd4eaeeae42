"""Backward kernels: dx, the two-stage pair dh and db, and da."""

import triton
import triton.language as tl

from .common import dot, dot_hidden, rounded, tile_of_program
from .philox import keep_tile, load_seed

__all__ = ["da_kernel", "dh_db_kernel", "dx_kernel", "reduce_kernel"]


@triton.jit(do_not_specialize=["M", "threshold"])
def dx_kernel(
    dy_ptr,
    weight_ptr,
    dh_ptr,
    lora_a_ptr,
    seed_ptr,
    dx_ptr,
    M,
    N,
    K,
    R: tl.constexpr,
    keep_scale,
    threshold,
    stride_dym,
    stride_dyn,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = dy W + keep * keep_scale * (dh A), one rounding.

    ======== =================== ===============================
    dy       (M, N)              any strides, 0 too
    weight   (N, K)              any strides
    dh       (M, R) fp32         contiguous
    lora_a   (R, K)              any strides, any float dtype
    seed     (2,) int64 or None  None: nothing is dropped
    dx       (M, K)              contiguous
    ======== =================== ===============================

    Grid: one program a tile (BLOCK_M, BLOCK_K) of dx, in ``tile_of_program``'s order; N is summed. The low-rank
    product comes first, for the mask acts on it alone. fp32 accumulation; 2 M N K + 2 M K R flops (the latter twice
    with SPLIT); reads dy, W, dh, A, writes dx.
    """
    tile_m, tile_k = tile_of_program(M, K, BLOCK_M, BLOCK_K, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tile_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = offs_m < M
    mask_k = offs_k < K
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        dh_ptrs = dh_ptr + offs_m[:, None] * R + offs_r[None, :]
        a_ptrs = lora_a_ptr + offs_r[:, None] * stride_ar + offs_k[None, :] * stride_ak
        dh = tl.load(dh_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # (BLOCK_M, BLOCK_R)
        a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_R, BLOCK_K)
        acc = dot_hidden(dh, rounded(a, dx_ptr.dtype.element_ty), acc, SPLIT, PRECISION)
    if seed_ptr is not None:
        keep = keep_tile(load_seed(seed_ptr), offs_m, tile_k * BLOCK_K, tl.cdiv(K, 8), threshold, BLOCK_K)
        acc *= tl.where(keep, keep_scale, 0.0)
    step = tl.full((), BLOCK_N, tl.int64)
    dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
    w_ptrs = weight_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk
    for n in range(0, N, BLOCK_N):
        mask_dy = mask_m[:, None]
        mask_w = mask_k[None, :]
        if not EVEN_N:
            mask_n = offs_n < N - n
            mask_dy = mask_dy & mask_n[None, :]
            mask_w = mask_w & mask_n[:, None]
        dy = tl.load(dy_ptrs, mask=mask_dy, other=0.0)  # (BLOCK_M, BLOCK_N)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)  # (BLOCK_N, BLOCK_K)
        acc = dot(dy, w, acc, PRECISION)
        dy_ptrs += step * stride_dyn
        w_ptrs += step * stride_wn
    dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
    tl.store(dx_ptrs, rounded(acc, dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


@triton.jit(do_not_specialize=["M", "chunk_m"])
def dh_db_kernel(
    dy_ptr,
    lora_b_ptr,
    h_ptr,
    dh_parts_ptr,
    db_parts_ptr,
    M,
    N,
    R: tl.constexpr,
    chunk_m,
    stride_dym,
    stride_dyn,
    stride_bn: tl.constexpr,
    stride_br: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """First stage of dh = s dy B and db = s dyᵀ h in one read of dy; ``reduce_kernel`` is the second.

    dh_parts[j, m, r] = Σ_{n in block j} dy[m, n] B[n, r];  db_parts[i, n, r] = Σ_{m in chunk i} dy[m, n] h[m, r].

    ========= ============================== =============================
    dy        (M, N)                         any strides, 0 too
    lora_b    (N, R)                         any strides, any float dtype
    h         (M, R) fp32                    contiguous
    dh_parts  (ceil(N / BLOCK_N), M, R) fp32 contiguous
    db_parts  (ceil(M / chunk_m), N, R) fp32 contiguous
    ========= ============================== =============================

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
    b = rounded(b, dy_ptr.dtype.element_ty)
    db = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    first = chunk * chunk_m
    last = tl.minimum(first + chunk_m, M)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < last
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
        h_ptrs = h_ptr + offs_m[None, :] * R + offs_r[:, None]
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_M, BLOCK_N)
        h = tl.load(h_ptrs, mask=mask_m[None, :] & mask_r[:, None], other=0.0)  # (BLOCK_R, BLOCK_M)
        dh = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION)
        dh_ptrs = dh_parts_ptr + (block_n * M + offs_m)[:, None] * R + offs_r[None, :]
        tl.store(dh_ptrs, dh, mask=mask_m[:, None] & mask_r[None, :])
        db = dot_hidden(h, dy, db, SPLIT, PRECISION)
    db_ptrs = db_parts_ptr + (chunk * N + offs_n)[None, :] * R + offs_r[:, None]
    tl.store(db_ptrs, db, mask=mask_r[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["dh_count", "db_count"])
def reduce_kernel(
    dh_parts_ptr,
    db_parts_ptr,
    dh_ptr,
    db_ptr,
    scaling,
    dh_size,
    db_size,
    dh_count,
    db_count,
    BLOCK: tl.constexpr,
):
    """dh = scaling Σ_j dh_parts[j] and db = scaling Σ_i db_parts[i], each in the order of j and i.

    ========= ======================== =============
    dh_parts  (dh_count, dh_size) fp32 contiguous
    db_parts  (db_count, db_size) fp32 contiguous
    dh        (dh_size,) fp32          contiguous
    db        (db_size,) any float     contiguous
    ========= ======================== =============

    Grid (ceil(dh_size / BLOCK) + ceil(db_size / BLOCK)): the first programs sum dh, the others db. fp32 accumulation;
    reads the parts, writes dh and db.
    """
    pid = tl.program_id(0).to(tl.int64)
    dh_programs = tl.cdiv(dh_size, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    if pid < dh_programs:
        offs = pid * BLOCK + tl.arange(0, BLOCK)
        mask = offs < dh_size
        part_ptrs = dh_parts_ptr + offs
        for _ in range(dh_count):
            acc += tl.load(part_ptrs, mask=mask, other=0.0)  # (BLOCK,)
            part_ptrs += dh_size
        tl.store(dh_ptr + offs, acc * scaling, mask=mask)
    else:
        offs = (pid - dh_programs) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < db_size
        part_ptrs = db_parts_ptr + offs
        for _ in range(db_count):
            acc += tl.load(part_ptrs, mask=mask, other=0.0)  # (BLOCK,)
            part_ptrs += db_size
        tl.store(db_ptr + offs, rounded(acc * scaling, db_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "threshold"])
def da_kernel(
    dh_ptr,
    x_ptr,
    seed_ptr,
    da_ptr,
    M,
    K,
    R: tl.constexpr,
    keep_scale,
    threshold,
    stride_xm,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """da = keep_scale dhᵀ (x * keep).

    ===== =================== =============================
    dh    (M, R) fp32         contiguous
    x     (M, K)              any strides
    seed  (2,) int64 or None  None: nothing is dropped
    da    (R, K) any float    contiguous
    ===== =================== =============================

    Grid (ceil(K / BLOCK_K), ceil(R / BLOCK_R)); every program walks all rows, so the sum needs no second stage. fp32
    accumulation, 2 M K R flops (4 with SPLIT); reads x once for each BLOCK_R ranks, dh from L2, writes da.
    """
    first_column = tl.program_id(0) * BLOCK_K
    offs_k = first_column.to(tl.int64) + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k = offs_k < K
    mask_r = offs_r < R
    if seed_ptr is not None:
        seed = load_seed(seed_ptr)
        groups = tl.cdiv(K, 8)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for m in range(0, M, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < M
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        dh_ptrs = dh_ptr + offs_m[None, :] * R + offs_r[:, None]
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        dh = tl.load(dh_ptrs, mask=mask_m[None, :] & mask_r[:, None], other=0.0)  # (BLOCK_R, BLOCK_M)
        if seed_ptr is not None:
            x = x * keep_tile(seed, offs_m, first_column, groups, threshold, BLOCK_K).to(x.dtype)
        acc = dot_hidden(dh, x, acc, SPLIT, PRECISION)
    da_ptrs = da_ptr + offs_r[:, None] * K + offs_k[None, :]
    tl.store(da_ptrs, rounded(acc * keep_scale, da_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_k[None, :])
