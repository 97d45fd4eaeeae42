"""Kernels of a mixture's stacked experts: rows are sorted by expert, and those of expert e end at ``offsets[e]``.

Tiles of rows. Group e is expert e's rows, group E what comes after the last expert's. A group that begins at row s has
the tiles from ``s // BLOCK_M + e`` on. Those are enough for any number of rows, and no two groups share one. So a
program finds its group in one read of the offsets: it counts the groups that end before it. There are
``M // BLOCK_M + E + 1`` tiles, whatever the routing, and at most E + 1 of them are without rows.
"""

import triton
import triton.language as tl

from .common import dot, dot_adapter, dot_hidden, rounded, tile_at
from .packed import keep_tile

__all__ = ["experts_outer_kernel", "experts_product_kernel", "experts_shrink_kernel"]


@triton.jit
def _rows_of_tile(offsets_ptr, tile, M, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(group, first row, end of the group's rows) of a tile; no row where first >= end."""
    offs_e = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets_ptr + offs_e, mask=offs_e < E, other=0)  # (BLOCK_E,)
    before = (offs_e < E) & (ends // BLOCK_M + offs_e < tile)
    group = tl.sum(before.to(tl.int32), 0)
    start = tl.load(offsets_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(offsets_ptr + group, mask=group < E, other=M)
    first = start + (tile - start // BLOCK_M - group) * BLOCK_M
    return group, first, end


@triton.jit
def _rows_of_x(tokens_ptr, offs_m, mask_m):
    """The rows of x that sorted rows are: themselves, or with tokens those of the tokens."""
    if tokens_ptr is not None:
        return tl.load(tokens_ptr + offs_m, mask=mask_m, other=0)  # (BLOCK_M,)
    else:
        return offs_m


@triton.jit(do_not_specialize=["M"])
def experts_shrink_kernel(
    x_ptr,
    tokens_ptr,
    offsets_ptr,
    a_ptr,
    words_ptr,
    h_ptr,
    scale,
    M,
    E,
    K,
    R: tl.constexpr,
    stride_xm,
    stride_xk,
    stride_ae,
    stride_ar,
    stride_ak,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h = scale (x * keep) A_eᵀ for the rows of each expert e, zero for rows of none.

    Forward: scale = 1 / (1 - p). Backward: dh, with x = dy, A_e = B_eᵀ, scale = s, no tokens, no words.

    ======= =========================== =======================================================
    x       (M, K), or (T, K)           any strides
    tokens  (M,) int64 or None          contiguous; the row of x that each sorted row is
    offsets (E,) int32                  contiguous
    A       (E, R, K)                   any strides, any float dtype
    words   (M, 4 ceil(K / 128)) int32  ``packed_mask``, a row for each sorted one; None: nothing is dropped
    h       (M, R) fp32                 contiguous
    ======= =========================== =======================================================

    Grid (tiles of rows, ceil(R / BLOCK_R)). fp32 accumulation, 2 M K R flops; reads x once for each BLOCK_R ranks (with
    tokens T K numbers from memory, the rest from L2), A once a tile (from L2), writes h.
    """
    tile = tl.program_id(0)
    group, first_row, end = _rows_of_tile(offsets_ptr, tile, M, E, BLOCK_M, BLOCK_E)
    offs_m = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < end
    mask_r = offs_r < R
    last = tl.where((group < E) & (first_row < end), K, 0)
    expert = tl.minimum(group, E - 1).to(tl.int64)
    rows = _rows_of_x(tokens_ptr, offs_m, mask_m)
    step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
    a_ptrs = a_ptr + expert * stride_ae + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, last, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_a = mask_r[None, :]
        if not EVEN_K:
            mask_k = offs_k < K - k
            mask_x = mask_x & mask_k[None, :]
            mask_a = mask_a & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # (BLOCK_M, BLOCK_K)
        a = tl.load(a_ptrs, mask=mask_a, other=0.0)  # (BLOCK_K, BLOCK_R)
        if words_ptr is not None:
            x = x * keep_tile(words_ptr, offs_m, k, mask_m, K, BLOCK_K).to(x.dtype)
        acc = dot_adapter(x, a, acc, PRECISION)
        x_ptrs += step * stride_xk
        a_ptrs += step * stride_ak
    h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
    tl.store(h_ptrs, acc * scale, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M", "tiles_m"])
def experts_product_kernel(
    x_ptr,
    tokens_ptr,
    offsets_ptr,
    weight_ptr,
    h_ptr,
    b_ptr,
    words_ptr,
    y_ptr,
    scaling,
    M,
    tiles_m,
    E,
    N,
    K,
    R: tl.constexpr,
    stride_xm,
    stride_xk,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = x W_eᵀ + keep * (scaling h B_eᵀ) for the rows of each expert e, zero for rows of none.

    Backward: dx, with x = dy, W_e its transpose, h = dh, B_e = A_eᵀ, scaling = 1 / (1 - p), no tokens.

    ======= =========================== =======================================================
    x       (M, K), or (T, K)           any strides
    tokens  (M,) int64 or None          contiguous; the row of x that each sorted row is
    offsets (E,) int32                  contiguous
    weight  (E, N, K)                   any strides, any float dtype
    h       (M, R) fp32                 contiguous
    B       (E, N, R)                   any strides, any float dtype
    words   (M, 4 ceil(N / 128)) int32  ``packed_mask``, of y's elements; None: nothing is dropped
    y       (M, N)                      contiguous
    ======= =========================== =======================================================

    Grid: one program a tile (BLOCK_M, BLOCK_N) of y, of tiles_m tiles of rows, in ``tile_at``'s order. The low-rank
    product comes first, because the mask acts on it only. fp32 accumulation, one rounding; 2 M N (K + R) flops (R's
    twice with SPLIT); reads x, W, h, B and writes y.
    """
    tile_m, tile_n = tile_at(tl.program_id(0), tiles_m * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    group, first_row, end = _rows_of_tile(offsets_ptr, tile_m, M, E, BLOCK_M, BLOCK_E)
    first_column = tile_n * BLOCK_N
    offs_m = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_n = first_column.to(tl.int64) + tl.arange(0, BLOCK_N)
    mask_m = offs_m < end
    mask_n = offs_n < N
    there = (group < E) & (first_row < end)
    last = tl.where(there, K, 0)
    ranks = tl.where(there, R, 0)
    expert = tl.minimum(group, E - 1).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in tl.range(0, ranks, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
        b_ptrs = b_ptr + expert * stride_be + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # (BLOCK_M, BLOCK_R)
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
        acc = dot_hidden(h * scaling, b, acc, y_ptr.dtype.element_ty, SPLIT, PRECISION)
    if words_ptr is not None:
        acc = tl.where(keep_tile(words_ptr, offs_m, first_column, mask_m, N, BLOCK_N), acc, 0.0)
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    rows = _rows_of_x(tokens_ptr, offs_m, mask_m)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = weight_ptr + expert * stride_we + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    for k in range(0, last, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_w = mask_n[None, :]
        if not EVEN_K:
            mask_k = offs_k < K - k
            mask_x = mask_x & mask_k[None, :]
            mask_w = mask_w & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = dot(x, rounded(w, x.dtype), acc, PRECISION)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
    tl.store(y_ptrs, rounded(acc, y_ptr.dtype.element_ty), mask=mask_y)


@triton.jit
def experts_outer_kernel(
    left_ptr,
    x_ptr,
    tokens_ptr,
    offsets_ptr,
    words_ptr,
    out_ptr,
    scale,
    K,
    R: tl.constexpr,
    stride_xm,
    stride_xk,
    stride_or,
    stride_ok,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """da_e = scale left_eᵀ (x_e * keep) of each expert e's rows; zero for an expert without rows.

    da: left = dh, scale = 1 / (1 - p). db: left = h, x = dy, scale = s, no tokens, no words.

    ======= =========================== =======================================================
    left    (M, R) fp32                 contiguous
    x       (M, K), or (T, K)           any strides
    tokens  (M,) int64 or None          contiguous; the row of x that each sorted row is
    offsets (E,) int32                  contiguous
    words   (M, 4 ceil(K / 128)) int32  ``packed_mask``, a row for each sorted one; None: nothing is dropped
    da      (E, R, K) any float         by the strides of rank and column; experts R K numbers apart
    ======= =========================== =======================================================

    Grid (ceil(K / BLOCK_K), E, ceil(R / BLOCK_R)): each program walks the rows of its expert, in their order. So no sum
    has parts, and the same input gives the same bits. fp32 accumulation, 2 M K R flops (4 with SPLIT); reads x once for
    each BLOCK_R ranks, left from L2, writes da.
    """
    first_column = tl.program_id(0) * BLOCK_K
    expert = tl.program_id(1)
    offs_k = first_column.to(tl.int64) + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k = offs_k < K
    mask_r = offs_r < R
    first = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    last = tl.load(offsets_ptr + expert)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < last
        rows = _rows_of_x(tokens_ptr, offs_m, mask_m)
        x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
        left_ptrs = left_ptr + offs_m[None, :] * R + offs_r[:, None]
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        left = tl.load(left_ptrs, mask=mask_m[None, :] & mask_r[:, None], other=0.0)  # (BLOCK_R, BLOCK_M)
        if words_ptr is not None:
            x = x * keep_tile(words_ptr, offs_m, first_column, mask_m, K, BLOCK_K).to(x.dtype)
        acc = dot_hidden(left, x, acc, x.dtype, SPLIT, PRECISION)
    out_ptrs = out_ptr + expert.to(tl.int64) * K * R + offs_r[:, None] * stride_or + offs_k[None, :] * stride_ok
    tl.store(out_ptrs, rounded(acc * scale, out_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_k[None, :])
