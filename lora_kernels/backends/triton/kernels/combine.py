"""Kernels between a mixture's sorted rows and its tokens: the weighted sum of a token's rows, and its gradients.

Slot ``s = t K + j`` is the j-th expert of token t, and ``places[s]`` is its sorted row. Every row is one slot's. Rows
from ``offsets[E - 1]`` on belong to no expert (sentinels): they count as zero, whatever they or their weights hold.
"""

import triton
import triton.language as tl

from .common import rounded

__all__ = ["combine_grad_kernel", "combine_kernel"]


@triton.jit
def combine_kernel(
    rows_ptr,
    weights_ptr,
    places_ptr,
    offsets_ptr,
    y_ptr,
    E,
    H,
    stride_rm,
    stride_rh,
    stride_wt,
    stride_wk,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """y[t] = Σ_j w[t, j] rows[places[t K + j]], or without weights the sum of the rows.

    ======= ================= ============================
    rows    (M, H)            any strides, M = T K
    weights (T, K) any float  any strides; None: all are 1
    places  (M,) int64        contiguous
    offsets (E,) int32        contiguous
    y       (T, H) any float  contiguous
    ======= ================= ============================

    Grid (T, blocks of H). fp32 accumulation in the order of j, one rounding. 2 M H flops; reads M H elements of rows
    and writes T H. Of a token's rows BLOCK_K are read at a time.
    """
    token = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    end = tl.load(offsets_ptr + E - 1)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(0, K, BLOCK_K):
        for i in tl.static_range(BLOCK_K):
            j = first + i
            place = tl.load(places_ptr + token * K + j, mask=j < K, other=0)
            present = (j < K) & (place < end)
            row_ptrs = rows_ptr + place * stride_rm + offs_h * stride_rh
            row = tl.load(row_ptrs, mask=mask_h & present, other=0.0).to(tl.float32)  # (BLOCK_H,)
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + token * stride_wt + j * stride_wk, mask=present, other=0.0)
                row *= weight.to(tl.float32)
            acc += row
    tl.store(y_ptr + token * H + offs_h, rounded(acc, y_ptr.dtype.element_ty), mask=mask_h)


@triton.jit(do_not_specialize=["M"])
def combine_grad_kernel(
    dy_ptr,
    rows_ptr,
    weights_ptr,
    places_ptr,
    offsets_ptr,
    d_rows_ptr,
    d_weights_ptr,
    M,
    E,
    H,
    stride_dt,
    stride_dh,
    stride_rm,
    stride_rh,
    stride_wt,
    stride_wk,
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """d_rows[places[s]] = w[t, j] dy[t] and d_weights[t, j] = <dy[t], rows[places[s]]>, for each slot s = t K + j.

    ========= ================ ========================================
    dy        (T, H) any float any strides, also 0
    rows      (M, H) any float any strides; None without d_weights
    weights   (T, K) any float any strides
    places    (M,) int64       contiguous, M = T K
    offsets   (E,) int32       contiguous
    d_rows    (M, H) any float contiguous; None where it is not due
    d_weights (T, K) any float contiguous; None where it is not due
    ========= ================ ========================================

    Grid (blocks of slots). The slots of a token are neighbours, so dy comes from memory once and then from L2. fp32
    arithmetic, one rounding. A slot's inner product is one program's, so no sum has parts. 3 M H flops; reads M H
    elements of rows and T H of dy, and writes M H.
    """
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < M
    tokens = offs_s // K
    end = tl.load(offsets_ptr + E - 1)
    places = tl.load(places_ptr + offs_s, mask=mask_s, other=0)  # (BLOCK_S,)
    present = mask_s & (places < end)
    if d_rows_ptr is not None:
        weight_ptrs = weights_ptr + tokens * stride_wt + (offs_s % K) * stride_wk
        weights = tl.load(weight_ptrs, mask=present, other=0.0).to(tl.float32)  # (BLOCK_S,)
    acc = tl.zeros((BLOCK_S, BLOCK_H), tl.float32)
    for h in range(0, H, BLOCK_H):
        offs_h = h + tl.arange(0, BLOCK_H).to(tl.int64)
        mask_h = offs_h < H
        mask = present[:, None] & mask_h[None, :]
        dy_ptrs = dy_ptr + tokens[:, None] * stride_dt + offs_h[None, :] * stride_dh
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_S, BLOCK_H)
        if d_weights_ptr is not None:
            row_ptrs = rows_ptr + places[:, None] * stride_rm + offs_h[None, :] * stride_rh
            acc += dy * tl.load(row_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_S, BLOCK_H)
        if d_rows_ptr is not None:
            d_row_ptrs = d_rows_ptr + places[:, None] * H + offs_h[None, :]
            d_rows = rounded(dy * weights[:, None], d_rows_ptr.dtype.element_ty)
            tl.store(d_row_ptrs, d_rows, mask=mask_s[:, None] & mask_h[None, :])
    if d_weights_ptr is not None:
        tl.store(d_weights_ptr + offs_s, rounded(tl.sum(acc, 1), d_weights_ptr.dtype.element_ty), mask=mask_s)
