"""Forward for few tokens: y and h in one pass over W, which K's parts may share, and the sum over these parts."""

import triton
import triton.language as tl

from .common import (
    dot,
    dot_adapter,
    dot_hidden,
    launch_dependents,
    rounded,
    store_hidden,
    store_parts,
    wait_for_previous,
)
from .packed import keep_tile

__all__ = ["few_tokens_kernel", "sum_parts_kernel"]


@triton.jit(do_not_specialize=["M"])
def few_tokens_kernel(
    x_ptr,
    weight_ptr,
    lora_a_ptr,
    lora_b_ptr,
    bias_ptr,
    words_ptr,
    h_ptr,
    y_ptr,
    scaling,
    M,
    N,
    K,
    R: tl.constexpr,
    keep_scale,
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
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = x Wᵀ + bias + scaling h Bᵀ and h = keep_scale (x * keep) Aᵀ in one pass over W, for M <= BLOCK_M.

    With PARTS > 1, part i is the same for K's i-th share, without bias and not rounded: the low-rank term is linear in
    h, so each part adds its own, and ``sum_parts_kernel`` is the second stage.

    ======== ======================= ==========================================
    x        (M, K)                  any strides
    weight   (N, K)                  any strides
    lora_a   (R, K)                  any strides, any float dtype, R <= BLOCK_R
    lora_b   (N, R)                  any strides, any float dtype
    bias     (N,) or None            any stride, any float dtype
    words    (M, 4 ceil(K / 128))    int32 (``packed_mask``); None: nothing is dropped
    h        (PARTS, M, R) fp32      contiguous; written by the first strip; with OPERAND scaling h, of one part
                                     (M, 2 OPERAND) bf16
    y        (M, N)                  contiguous; (PARTS, M, N) fp32 with parts
    ======== ======================= ==========================================

    Grid (ceil(N / BLOCK_N), PARTS): a strip of y each, and every program computes all of h beside it, for W's read
    dominates and A comes from L2. fp32 accumulation; 2 M N K + 2 M N R flops and 2 M K R more a strip; reads W once.
    """
    launch_dependents(PDL)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    first = 0
    last = K
    if PARTS > 1:
        chunk = tl.cdiv(tl.cdiv(K, PARTS), BLOCK_K) * BLOCK_K
        first = tl.program_id(1) * chunk
        last = tl.minimum(first + chunk, K)
    offs_k = first + tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < R
    step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = weight_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    a_ptrs = lora_a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(first, last, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_w = mask_n[None, :]
        mask_a = mask_r[None, :]
        if not EVEN_K:
            mask_k = k + tl.arange(0, BLOCK_K) < last
            mask_x = mask_x & mask_k[None, :]
            mask_w = mask_w & mask_k[:, None]
            mask_a = mask_a & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)  # (BLOCK_K, BLOCK_N)
        a = tl.load(a_ptrs, mask=mask_a, other=0.0)  # (BLOCK_K, BLOCK_R)
        acc = dot(x, w, acc, PRECISION)
        if words_ptr is not None:
            x = x * keep_tile(words_ptr, offs_m, k, mask_m, K, BLOCK_K).to(x.dtype)
        h = dot_adapter(x, a, h, PRECISION)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
        a_ptrs += step * stride_ak
    h = tl.where(mask_r[None, :], h * keep_scale, 0.0)  # beyond R an infinite x has left inf * 0
    offs_part = tl.program_id(1).to(tl.int64) * M + offs_m
    if OPERAND > 0:
        h = tl.where(mask_r[None, :], h * scaling, 0.0)
    if tl.program_id(0) == 0:
        ROW: tl.constexpr = 2 * OPERAND if PARTS == 1 and OPERAND > 0 else R
        h_ptrs = h_ptr + offs_part[:, None] * ROW + offs_r[None, :]
        store_hidden(h_ptrs, h, mask_m, offs_r, R, OPERAND if PARTS == 1 else 0)
    b_ptrs = lora_b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
    b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
    acc = dot_hidden(h if OPERAND > 0 else h * scaling, b, acc, x_ptr.dtype.element_ty, SPLIT, PRECISION)
    if PARTS == 1 and bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)  # (BLOCK_N,)
        acc += rounded(bias, y_ptr.dtype.element_ty).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_part[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, rounded(acc, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M"])
def sum_parts_kernel(
    y_parts_ptr,
    h_parts_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    M,
    N,
    R: tl.constexpr,
    stride_bias,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = Σ_i y_parts[i] + bias, rounded once, and h = Σ_i h_parts[i], each in the order of i.

    ======== =================== ==============================
    y_parts  (PARTS, M, N) fp32  contiguous
    h_parts  (PARTS, M, R) fp32  contiguous
    bias     (N,) or None        any stride, any float dtype
    y        (M, N)              contiguous
    h        (M, R) fp32         contiguous; with OPERAND (M, 2 OPERAND) bf16, s h
    ======== =================== ==============================

    Grid (ceil(M N / BLOCK) + ceil(M R / BLOCK), with OPERAND in R's place): the first programs sum y, the others h.
    fp32 accumulation; reads the parts, writes y and h.
    """
    pid = tl.program_id(0).to(tl.int64)
    size = tl.full((), N, tl.int64) * M
    y_programs = tl.cdiv(size, BLOCK)
    wait_for_previous(PDL)
    acc = tl.zeros((BLOCK,), tl.float32)
    if pid < y_programs:
        offs = pid * BLOCK + tl.arange(0, BLOCK)
        mask = offs < size
        for i in tl.static_range(PARTS):
            acc += tl.load(y_parts_ptr + i * size + offs, mask=mask, other=0.0)  # (BLOCK,)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs % N * stride_bias, mask=mask, other=0.0)  # (BLOCK,)
            acc += rounded(bias, y_ptr.dtype.element_ty).to(tl.float32)
        tl.store(y_ptr + offs, rounded(acc, y_ptr.dtype.element_ty), mask=mask)
    else:
        size_h = tl.full((), R, tl.int64) * M
        offs = (pid - y_programs) * BLOCK + tl.arange(0, BLOCK)
        if OPERAND > 0:
            row = offs // OPERAND
            offs_r = offs % OPERAND
            for i in tl.static_range(PARTS):
                h_ptrs = h_parts_ptr + i * size_h + row * R + offs_r
                acc += tl.load(h_ptrs, mask=(row < M) & (offs_r < R), other=0.0)  # (BLOCK,)
            store_parts(h_ptr + row * 2 * OPERAND + offs_r, acc, row < M, OPERAND)
        else:
            mask = offs < size_h
            for i in tl.static_range(PARTS):
                acc += tl.load(h_parts_ptr + i * size_h + offs, mask=mask, other=0.0)  # (BLOCK,)
            tl.store(h_ptr + offs, acc, mask=mask)
