"""Forward for few tokens over a quantised weight that is read as it is stored, and never written as values."""

import triton
import triton.language as tl

from .codes import number_table, weight_tile
from .common import add_low_rank, dot, dot_adapter, dot_hidden, launch_dependents, store_output
from .packed import keep_tile

__all__ = ["few_codes_kernel"]


@triton.jit(do_not_specialize=["M"])
def few_codes_kernel(
    x_ptr,
    data_ptr,
    scales_ptr,
    outer_ptr,
    outer_table_ptr,
    offset_ptr,
    zeros_ptr,
    lora_a_ptr,
    lora_b_ptr,
    bias_ptr,
    gain_ptr,
    words_ptr,
    h_ptr,
    y_ptr,
    linear_ptr,
    scaling,
    M,
    N,
    K,
    R: tl.constexpr,
    keep_scale,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_bn: tl.constexpr,
    stride_br: tl.constexpr,
    stride_bias,
    stride_gain,
    stride_hm: tl.constexpr,
    NUMBER: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    OUTER: tl.constexpr,
    PER: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = gain * (x Wᵀ + scaling h Bᵀ) + bias for M <= BLOCK_M; with lora_a also h = keep_scale (x * keep) Aᵀ.

    Without lora_a, h is given. With PARTS > 1, which lora_a has alone, part i is the same for K's i-th share, without
    bias and not rounded: ``sum_parts_kernel`` is the second stage. Each tile of W is made in registers, with the very
    numbers that W's values have (``weight_tile``; there are scales to zeros).

    ======== ======================= ================================================================
    x        (M, K)                  any strides
    data     (N, K / 2) or (N, K)    contiguous; two 4-bit codes a byte (K a multiple of UNIT), or bytes
    lora_a   (R, K) or None          any strides, any float dtype, R <= BLOCK_R
    lora_b   (N, R)                  any strides, any float dtype
    bias     (N,) or None            any stride, any float dtype
    gain     (N,) fp32 or None       any stride; None with PARTS > 1
    words    (M, 4 ceil(K / 128))    int32 (``packed_mask``); None: nothing is dropped
    h        (PARTS, M, R) fp32      rows of stride_hm; with lora_a contiguous, written by the first strip
    y        (M, N)                  contiguous; (PARTS, M, N) fp32 with parts
    linear   (M, N) or None          contiguous; gets x Wᵀ + scaling h Bᵀ
    ======== ======================= ================================================================

    Grid (ceil(N / BLOCK_N), PARTS): a strip of y each, as in ``few_tokens_kernel``. fp32 accumulation; 2 M N K +
    2 M N R flops, with lora_a 2 M K R more a strip; reads the codes once.
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
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    if lora_a_ptr is not None:
        a_ptrs = lora_a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    table = number_table(NUMBER)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(first, last, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_a = mask_r[None, :]
        if not EVEN_K:
            mask_k = k + tl.arange(0, BLOCK_K) < last
            mask_x = mask_x & mask_k[None, :]
            mask_a = mask_a & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # (BLOCK_M, BLOCK_K)
        w = weight_tile(
            data_ptr, scales_ptr, outer_ptr, outer_table_ptr, offset_ptr, zeros_ptr, table, offs_n, k, last,
            mask_n, K, dtype, NUMBER, HIGH, WIDE, OUTER, PER, UNIT, BLOCK_K,
        )  # (BLOCK_N, BLOCK_K)  # fmt: skip
        acc = dot(x, tl.trans(w), acc, PRECISION)
        if lora_a_ptr is not None:
            a = tl.load(a_ptrs, mask=mask_a, other=0.0)  # (BLOCK_K, BLOCK_R)
            if words_ptr is not None:
                x = x * keep_tile(words_ptr, offs_m, k, mask_m, K, BLOCK_K).to(x.dtype)
            h = dot_adapter(x, a, h, PRECISION)
            a_ptrs += step * stride_ak
        x_ptrs += step * stride_xk
    offs_part = tl.program_id(1).to(tl.int64) * M + offs_m
    if lora_a_ptr is not None:
        h = tl.where(mask_r[None, :], h * keep_scale, 0.0)  # beyond R an infinite x has left inf * 0
        if tl.program_id(0) == 0:
            h_ptrs = h_ptr + offs_part[:, None] * stride_hm + offs_r[None, :]
            tl.store(h_ptrs, h, mask=mask_m[:, None] & mask_r[None, :])
        b_ptrs = lora_b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
        acc = dot_hidden(h * scaling, b, acc, dtype, SPLIT, PRECISION)
    else:
        acc = add_low_rank(
            acc, h_ptr, None, lora_b_ptr, scaling, 0, offs_m, offs_n, mask_m, mask_n,
            M, R, stride_bn, stride_br, stride_hm, dtype, BLOCK_R, 1, 0, SPLIT, PRECISION,
        )  # fmt: skip
    if PARTS > 1:
        y_ptrs = y_ptr + offs_part[:, None] * N + offs_n[None, :]
        tl.store(y_ptrs, acc, mask=mask_m[:, None] & mask_n[None, :])
    else:
        store_output(
            acc, y_ptr, linear_ptr, bias_ptr, gain_ptr, stride_bias, stride_gain, offs_m, offs_n, mask_m, mask_n, N
        )
