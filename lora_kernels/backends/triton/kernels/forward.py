"""Forward kernels: the shrink, the product with the low-rank K step, and both in one pass for few tokens."""

import triton
import triton.language as tl

from .common import dot, dot_hidden, rounded, tile_of_program
from .philox import keep_tile, load_seed

__all__ = ["few_tokens_kernel", "forward_kernel", "shrink_kernel"]


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    seed_ptr,
    M,
    K,
    R: tl.constexpr,
    scale,
    threshold,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h = scale (x * keep) Aᵀ. Forward: scale = 1/(1-p). Backward: dh, with x = dy, A = Bᵀ, scale = s, no seed.

    ===== =================== =============================================
    x     (M, K)              any strides
    A     (R, K)              any strides, any float dtype
    h     (M, R) fp32         contiguous
    seed  (2,) int64 or None  None: nothing is dropped
    ===== =================== =============================================

    Grid (ceil(M / BLOCK_M), ceil(R / BLOCK_R)). fp32 accumulation, 2 M K R flops; reads x once for each BLOCK_R ranks
    (once for R <= 128), A once a row of programs (from L2), writes 4 M R bytes.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < M
    mask_r = offs_r < R
    step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    a_ptrs = a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    if seed_ptr is not None:
        seed = load_seed(seed_ptr)
        groups = tl.cdiv(K, 8)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_a = mask_r[None, :]
        if not EVEN_K:
            mask_k = offs_k < K - k
            mask_x = mask_x & mask_k[None, :]
            mask_a = mask_a & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # (BLOCK_M, BLOCK_K)
        a = tl.load(a_ptrs, mask=mask_a, other=0.0)  # (BLOCK_K, BLOCK_R)
        if seed_ptr is not None:
            x = x * keep_tile(seed, offs_m, k, groups, threshold, BLOCK_K).to(x.dtype)
        acc = dot(x, rounded(a, x.dtype), acc, PRECISION)
        x_ptrs += step * stride_xk
        a_ptrs += step * stride_ak
    h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
    tl.store(h_ptrs, acc * scale, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M"])
def forward_kernel(
    x_ptr,
    weight_ptr,
    lora_b_ptr,
    bias_ptr,
    h_ptr,
    y_ptr,
    M,
    N,
    K,
    R: tl.constexpr,
    scaling,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bn: tl.constexpr,
    stride_br: tl.constexpr,
    stride_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = x Wᵀ + bias + scaling h Bᵀ, one rounding.

    ======== =============== ==========================================
    x        (M, K)          any strides
    weight   (N, K)          any strides
    lora_b   (N, R)          any strides, any float dtype
    bias     (N,) or None    any stride, any float dtype
    h        (M, R) fp32     contiguous
    y        (M, N)          contiguous
    ======== =============== ==========================================

    Grid: one program a tile of y, in ``tile_of_program``'s order. The K loop comes first and h is read last, so that
    the shrink kernel could still run meanwhile. fp32 accumulation; 2 M N K + 2 M N R flops (the latter twice with
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
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
        b_ptrs = lora_b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # (BLOCK_M, BLOCK_R)
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
        acc = dot_hidden(h * scaling, rounded(b, y_ptr.dtype.element_ty), acc, SPLIT, PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)  # (BLOCK_N,)
        acc += rounded(bias, y_ptr.dtype.element_ty).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, rounded(acc, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "threshold"])
def few_tokens_kernel(
    x_ptr,
    weight_ptr,
    lora_a_ptr,
    lora_b_ptr,
    bias_ptr,
    seed_ptr,
    h_ptr,
    y_ptr,
    M,
    N,
    K,
    R: tl.constexpr,
    scaling,
    keep_scale,
    threshold,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn: tl.constexpr,
    stride_br: tl.constexpr,
    stride_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = x Wᵀ + bias + scaling h Bᵀ and h = keep_scale (x * keep) Aᵀ in one pass over W, for M <= BLOCK_M.

    ======== =================== ==========================================
    x        (M, K)              any strides
    weight   (N, K)              any strides
    lora_a   (R, K)              any strides, any float dtype, R <= BLOCK_R
    lora_b   (N, R)              any strides, any float dtype
    bias     (N,) or None        any stride, any float dtype
    seed     (2,) int64 or None  None: nothing is dropped
    h        (M, R) fp32         contiguous; written by program 0
    y        (M, N)              contiguous
    ======== =================== ==========================================

    Grid (ceil(N / BLOCK_N)): a strip of y each, and every program computes all of h beside it, for W's read dominates
    and A comes from L2. fp32 accumulation; 2 M N K + 2 M N R flops and 2 M K R more a program; reads W once.
    """
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < R
    step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = weight_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    a_ptrs = lora_a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    if seed_ptr is not None:
        seed = load_seed(seed_ptr)
        groups = tl.cdiv(K, 8)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_w = mask_n[None, :]
        mask_a = mask_r[None, :]
        if not EVEN_K:
            mask_k = offs_k < K - k
            mask_x = mask_x & mask_k[None, :]
            mask_w = mask_w & mask_k[:, None]
            mask_a = mask_a & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)  # (BLOCK_K, BLOCK_N)
        a = tl.load(a_ptrs, mask=mask_a, other=0.0)  # (BLOCK_K, BLOCK_R)
        acc = dot(x, w, acc, PRECISION)
        if seed_ptr is not None:
            x = x * keep_tile(seed, offs_m, k, groups, threshold, BLOCK_K).to(x.dtype)
        h = dot(x, rounded(a, x.dtype), h, PRECISION)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
        a_ptrs += step * stride_ak
    h = tl.where(mask_r[None, :], h * keep_scale, 0.0)  # beyond R an infinite x has left inf * 0
    if tl.program_id(0) == 0:
        h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
        tl.store(h_ptrs, h, mask=mask_m[:, None] & mask_r[None, :])
    b_ptrs = lora_b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
    b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
    acc = dot_hidden(h * scaling, rounded(b, y_ptr.dtype.element_ty), acc, SPLIT, PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)  # (BLOCK_N,)
        acc += rounded(bias, y_ptr.dtype.element_ty).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, rounded(acc, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
