"""Forward kernels: the shrink, the product with the low-rank K step, and the low-rank term alone."""

import triton
import triton.language as tl

from .common import (
    add_low_rank,
    dot,
    dot_adapter,
    launch_dependents,
    store_hidden,
    store_output,
    tile_of_program,
    wait_for_previous,
)
from .packed import keep_tile

__all__ = ["expand_kernel", "forward_kernel", "shrink_kernel"]


@triton.jit(do_not_specialize=["M"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    words_ptr,
    scale,
    M,
    K,
    R: tl.constexpr,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """h = scale (x * keep) Aᵀ. Forward: scale = 1/(1-p). Backward: dh, with x = dy, A = Bᵀ, scale = s, no words.

    ===== ===================== =============================================
    x     (M, K)                any strides
    A     (R, K)                any strides, any float dtype
    h     (PARTS, M, R) fp32    contiguous; the sum over the parts is meant
    words (M, 4 ceil(K / 128))  int32 (``packed_mask``); None: nothing is dropped
    ===== ===================== =============================================

    With OPERAND one part of h is (M, 2 OPERAND) bf16 (``choose.hidden_operand``), and scale has s in it.

    Grid (ceil(M / BLOCK_M), ceil(R / BLOCK_R), PARTS); each part sums its share of K. fp32 accumulation, 2 M K R flops;
    reads x once for each BLOCK_R ranks (once for R <= 128), A once a row of programs (from L2), writes 4 M R PARTS
    bytes. With PDL the next kernel may start at once; it has to wait before it reads h.
    """
    launch_dependents(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = 0
    last = K
    if PARTS > 1:
        chunk = tl.cdiv(tl.cdiv(K, PARTS), BLOCK_K) * BLOCK_K
        first = tl.program_id(2) * chunk
        last = tl.minimum(first + chunk, K)
    offs_k = first + tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < M
    mask_r = offs_r < R
    step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    a_ptrs = a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(first, last, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_a = mask_r[None, :]
        if not EVEN_K:
            mask_k = k + tl.arange(0, BLOCK_K) < last
            mask_x = mask_x & mask_k[None, :]
            mask_a = mask_a & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # (BLOCK_M, BLOCK_K)
        a = tl.load(a_ptrs, mask=mask_a, other=0.0)  # (BLOCK_K, BLOCK_R)
        if words_ptr is not None:
            x = x * keep_tile(words_ptr, offs_m, k, mask_m, K, BLOCK_K).to(x.dtype)
        acc = dot_adapter(x, a, acc, PRECISION)
        x_ptrs += step * stride_xk
        a_ptrs += step * stride_ak
    ROW: tl.constexpr = 2 * OPERAND if PARTS == 1 and OPERAND > 0 else R
    h_ptrs = h_ptr + offs_m[:, None] * ROW + offs_r[None, :]
    if PARTS > 1:
        h_ptrs += tl.program_id(2).to(tl.int64) * M * R
    store_hidden(h_ptrs, acc * scale, mask_m, offs_r, R, OPERAND if PARTS == 1 else 0)


@triton.jit(do_not_specialize=["M"])
def forward_kernel(
    x_ptr,
    weight_ptr,
    lora_b_ptr,
    bias_ptr,
    gain_ptr,
    h_ptr,
    h_sum_ptr,
    y_ptr,
    linear_ptr,
    scaling,
    M,
    N,
    K,
    R: tl.constexpr,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bn: tl.constexpr,
    stride_br: tl.constexpr,
    stride_bias,
    stride_gain,
    stride_hm: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """l = x Wᵀ + scaling h Bᵀ and y = l + bias, or with a gain y = gain * l + bias; one rounding each.

    ======== ========================= ==========================================
    x        (M, K)                    any strides
    weight   (N, K)                    any strides
    lora_b   (N, R)                    any strides, any float dtype
    bias     (N,) or None              any stride, any float dtype
    gain     (N,) fp32 or None         any stride
    h        (PARTS, M, R) fp32        rows in one piece, stride_hm apart; with OPERAND and one part (M, 2 OPERAND) bf16
    h_sum    (M, R) fp32 or None       contiguous; Σ h, where PARTS > 1; with OPERAND (M, 2 OPERAND) bf16
    y        (M, N)                    contiguous
    linear   (M, N) or None            contiguous; l
    ======== ========================= ==========================================

    Grid: one program a tile of y, in ``tile_of_program``'s order. The K loop comes first and h is read last, so that
    with PDL the shrink kernel still runs meanwhile. fp32 accumulation; 2 M N K + 2 M N R flops (the latter twice with
    SPLIT); reads x, W, h, B, writes y.
    """
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = weight_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_w = mask_n[None, :]
        if not EVEN_K:
            mask_k = offs_k < K - k
            mask_x = mask_x & mask_k[None, :]
            mask_w = mask_w & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = dot(x, w, acc, PRECISION)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
    wait_for_previous(PDL)
    acc = add_low_rank(
        acc,
        h_ptr,
        h_sum_ptr,
        lora_b_ptr,
        scaling,
        tile_n,
        offs_m,
        offs_n,
        mask_m,
        mask_n,
        M,
        R,
        stride_bn,
        stride_br,
        stride_hm,
        y_ptr.dtype.element_ty,
        BLOCK_R,
        PARTS,
        OPERAND,
        SPLIT,
        PRECISION,
    )
    store_output(
        acc, y_ptr, linear_ptr, bias_ptr, gain_ptr, stride_bias, stride_gain, offs_m, offs_n, mask_m, mask_n, N
    )


@triton.jit(do_not_specialize=["M"])
def expand_kernel(
    lora_b_ptr,
    bias_ptr,
    gain_ptr,
    h_ptr,
    h_sum_ptr,
    y_ptr,
    linear_ptr,
    scaling,
    M,
    N,
    R: tl.constexpr,
    stride_bn: tl.constexpr,
    stride_br: tl.constexpr,
    stride_bias,
    stride_gain,
    stride_hm: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    ADD: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = bias + scaling h Bᵀ, or with ADD l = (what y holds) + scaling h Bᵀ and y = gain * l + bias; one rounding.

    ======== ========================= ==========================================
    lora_b   (N, R)                    any strides, any float dtype
    bias     (N,) or None              any stride, any float dtype
    gain     (N,) fp32 or None         any stride
    h        (PARTS, M, R) fp32        rows in one piece, stride_hm apart; with OPERAND and one part (M, 2 OPERAND) bf16
    h_sum    (M, R) fp32 or None       contiguous; Σ h, where PARTS > 1; with OPERAND (M, 2 OPERAND) bf16
    y        (M, N)                    contiguous
    linear   (M, N) or None            contiguous; l
    ======== ========================= ==========================================

    Grid: one program a tile of y. fp32 accumulation; 2 M N R flops (twice with SPLIT); reads h and B from L2, writes y,
    and reads it with ADD.
    """
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, 1)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    wait_for_previous(PDL)
    acc = add_low_rank(
        acc,
        h_ptr,
        h_sum_ptr,
        lora_b_ptr,
        scaling,
        tile_n,
        offs_m,
        offs_n,
        mask_m,
        mask_n,
        M,
        R,
        stride_bn,
        stride_br,
        stride_hm,
        y_ptr.dtype.element_ty,
        BLOCK_R,
        PARTS,
        OPERAND,
        SPLIT,
        PRECISION,
    )
    if ADD:
        y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
        mask_y = mask_m[:, None] & mask_n[None, :]
        acc += tl.load(y_ptrs, mask=mask_y, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    store_output(
        acc, y_ptr, linear_ptr, bias_ptr, gain_ptr, stride_bias, stride_gain, offs_m, offs_n, mask_m, mask_n, N
    )
