"""Kernels of DoRA: the norms of W + s B A in one read of W, and the gradients of a gain of y's columns."""

import triton
import triton.language as tl

from .common import as_adapter, dot_adapters, rounded

__all__ = ["gain_grad_kernel", "row_norms_kernel"]


@triton.jit
def row_norms_kernel(
    weight_ptr,
    lora_a_ptr,
    lora_b_ptr,
    norms_ptr,
    scaling,
    N,
    K,
    R: tl.constexpr,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """norms[n] = ‖W[n] + scaling B[n] A‖.

    ======= ========== ============================
    weight  (N, K)     any strides
    lora_a  (R, K)     any strides, any float dtype
    lora_b  (N, R)     any strides, any float dtype
    norms   (N,) fp32  contiguous
    ======= ========== ============================

    Grid (ceil(N / BLOCK_N)): each program walks K, forms a tile of B A in registers, adds it to W's and squares the
    sum. Against ‖w‖² + 2 s ⟨A w, b⟩ + s² ⟨A Aᵀ b, b⟩ this takes as many flops, needs no A Aᵀ, leaves R unlimited, and
    nothing cancels. IEEE products of fp32, fp32 accumulation; 2 N K R flops; reads W once, A once a program (from L2),
    B once a step of K (from L1; for R <= BLOCK_R it stays in registers).
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_n = offs_n < N
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    b_ptrs = lora_b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
    if R <= BLOCK_R:
        mask_b = mask_n[:, None] & (offs_r < R)[None, :]
        b = as_adapter(tl.load(b_ptrs, mask=mask_b, other=0.0), dtype)  # (BLOCK_N, BLOCK_R)
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_w = mask_n[:, None]
        mask_a = (offs_r < R)[:, None]
        if not EVEN_K:
            mask_w = mask_w & (offs_k < K)[None, :]
            mask_a = mask_a & (offs_k < K)[None, :]
        w_ptrs = weight_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk
        a_ptrs = lora_a_ptr + offs_r[:, None] * stride_ar + offs_k[None, :] * stride_ak
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)  # (BLOCK_N, BLOCK_K)
        added = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if R <= BLOCK_R:
            a = as_adapter(tl.load(a_ptrs, mask=mask_a, other=0.0), dtype)  # (BLOCK_R, BLOCK_K)
            added = dot_adapters(b, a, added, dtype)
        else:
            for r in tl.range(0, R, BLOCK_R, num_stages=1):
                mask_r = offs_r < R - r
                mask_k = offs_k < K
                b = tl.load(b_ptrs + r * stride_br, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
                a = tl.load(a_ptrs + r * stride_ar, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
                added = dot_adapters(b, a, added, dtype)
        row = w.to(tl.float32) + scaling * added
        squares += row * row
    tl.store(norms_ptr + offs_n, tl.sqrt(tl.sum(squares, 1)), mask=mask_n)


@triton.jit(do_not_specialize=["M", "chunk_m"])
def gain_grad_kernel(
    dy_ptr,
    linear_ptr,
    gain_ptr,
    dlinear_ptr,
    dgain_parts_ptr,
    dbias_parts_ptr,
    M,
    N,
    chunk_m,
    stride_dym,
    stride_dyn,
    stride_lm,
    stride_ln,
    stride_gain,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dlinear = gain * dy, and first stage of dgain = Σ_m dy * linear and dbias = Σ_m dy, in one read of both.

    dgain_parts[i, n] and dbias_parts[i, n] are the sums over the rows m of chunk i; ``reduce_kernel`` adds them.

    ============ ================================== ==============================================
    dy           (M, N)                             any strides, 0 too
    linear       (M, N) or None                     any strides; None: dgain is not due
    gain         (N,) fp32                          any stride
    dlinear      (M, N)                             contiguous
    dgain_parts  (ceil(M / chunk_m), N) fp32, None  contiguous
    dbias_parts  (ceil(M / chunk_m), N) fp32, None  contiguous; None: dbias is not due
    ============ ================================== ==============================================

    Grid (blocks of N, chunks of M); a chunk is a multiple of BLOCK_M rows. The sums stay in registers, as tiles: rows
    are added up once a program. fp32 accumulation, 4 M N flops; reads dy and linear, writes dlinear.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(1).to(tl.int64)
    mask_n = offs_n < N
    gain = tl.load(gain_ptr + offs_n * stride_gain, mask=mask_n, other=0.0)  # (BLOCK_N,)
    dgain = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = chunk * chunk_m
    last = tl.minimum(first + chunk_m, M)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (offs_m < last)[:, None] & mask_n[None, :]
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
        dl = rounded(dy * gain[None, :], dlinear_ptr.dtype.element_ty)
        tl.store(dlinear_ptr + offs_m[:, None] * N + offs_n[None, :], dl, mask=mask)
        if linear_ptr is not None:
            l_ptrs = linear_ptr + offs_m[:, None] * stride_lm + offs_n[None, :] * stride_ln
            linear = tl.load(l_ptrs, mask=mask, other=0.0)  # (BLOCK_M, BLOCK_N)
            dgain += dy * linear.to(tl.float32)
        if dbias_parts_ptr is not None:
            dbias += dy
    if linear_ptr is not None:
        tl.store(dgain_parts_ptr + chunk * N + offs_n, tl.sum(dgain, 0), mask=mask_n)
    if dbias_parts_ptr is not None:
        tl.store(dbias_parts_ptr + chunk * N + offs_n, tl.sum(dbias, 0), mask=mask_n)
