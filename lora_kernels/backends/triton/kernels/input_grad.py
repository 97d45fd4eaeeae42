"""Kernels for dx: the product with the masked low-rank term inside, the same by TMA, and the low-rank term alone."""

import triton
import triton.language as tl

from .common import dot, dot_hidden, rounded, tile_at, tile_of_program
from .packed import keep_tile, row_words

__all__ = ["dx_kernel", "dx_low_rank_kernel", "dx_persistent_kernel"]


@triton.jit
def _low_rank(
    dh_ptr, lora_a_ptr, words_ptr, keep_scale, offs_m, first_column, mask_m, K,
    FIRST: tl.constexpr, LAST: tl.constexpr, stride_dhm: tl.constexpr, stride_ar, stride_ak, dtype: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """keep * keep_scale * (dh A) for ranks FIRST to LAST and a tile of dx: (BLOCK_M, BLOCK_K) fp32.

    What is dropped is zero, also where dh is not finite. Where all ranks are one step the scale acts on dh, for the
    tile's product with it takes the largest one's last registers; over several steps it is dh that has none to spare.
    """
    ONE_STEP: tl.constexpr = LAST - FIRST <= BLOCK_R
    BLOCK_M: tl.constexpr = offs_m.shape[0]
    offs_k = first_column.to(tl.int64) + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for r in tl.range(FIRST, LAST, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < LAST
        dh_ptrs = dh_ptr + offs_m[:, None] * stride_dhm + offs_r[None, :]
        a_ptrs = lora_a_ptr + offs_r[:, None] * stride_ar + offs_k[None, :] * stride_ak
        dh = tl.load(dh_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # (BLOCK_M, BLOCK_R)
        a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_R, BLOCK_K)
        if ONE_STEP and words_ptr is not None:
            dh *= keep_scale
        acc = dot_hidden(dh, a, acc, dtype, SPLIT, PRECISION)
    if words_ptr is not None:
        keep = keep_tile(words_ptr, offs_m, first_column, mask_m, K, BLOCK_K)
        acc = tl.where(keep, acc if ONE_STEP else acc * keep_scale, 0.0)
    return acc


@triton.jit(do_not_specialize=["M"])
def dx_kernel(
    dy_ptr,
    weight_ptr,
    dh_ptr,
    lora_a_ptr,
    words_ptr,
    dx_ptr,
    M,
    N,
    K,
    R: tl.constexpr,
    keep_scale,
    stride_dym,
    stride_dyn,
    stride_wn,
    stride_wk,
    stride_dhm: tl.constexpr,
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

    ======== =================== =================================
    dy       (M, N)              any strides, 0 too
    weight   (N, K)              any strides
    dh       (M, R) fp32         rows in one piece, stride_dhm apart
    lora_a   (R, K)              any strides, any float dtype
    words    (M, 4 ceil(K / 128)) int32 (``packed_mask``); None: nothing is dropped
    dx       (M, K)              contiguous
    ======== =================== =================================

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
    acc = _low_rank(
        dh_ptr, lora_a_ptr, words_ptr, keep_scale, offs_m, tile_k * BLOCK_K, mask_m, K,
        0, R, stride_dhm, stride_ar, stride_ak, dx_ptr.dtype.element_ty, BLOCK_K, BLOCK_R, SPLIT, PRECISION,
    )  # fmt: skip
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


@triton.jit(do_not_specialize=["M"])
def dx_persistent_kernel(
    dy_ptr,
    weight_ptr,
    dh_ptr,
    lora_a_ptr,
    words_ptr,
    dx_ptr,
    M,
    N,
    K,
    R: tl.constexpr,
    keep_scale,
    stride_dym,
    stride_wn,
    stride_dhm: tl.constexpr,
    stride_ar,
    stride_ak,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As ``dx_kernel``, for operands that TMA can read, by programs that stay and walk the tiles.

    ======== =================== =====================================================
    dy       (M, N), 16-bit      rows contiguous and, as the storage, on 16-byte boundaries
    weight   (N, K), 16-bit      rows contiguous and, as the storage, on 16-byte boundaries
    dh       (M, R) fp32         rows in one piece, stride_dhm apart
    lora_a   (R, K)              any strides, any float dtype
    words    (M, 4 ceil(K / 128)) int32 (``packed_mask``); None: nothing is dropped
    dx       (M, K)              contiguous
    ======== =================== =====================================================

    Grid (programs): each takes every (number of programs)-th tile of dx, in ``tile_at``'s order. Sums, flops and bytes
    are ``dx_kernel``'s.
    """
    dy_desc = tl.make_tensor_descriptor(dy_ptr, [M, N], [stride_dym, 1], [BLOCK_M, BLOCK_N])
    w_desc = tl.make_tensor_descriptor(weight_ptr, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_k = tile_at(tile, M, K, BLOCK_M, BLOCK_K, GROUP_M)
        offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_k = tile_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_m = offs_m < M
        acc = _low_rank(
            dh_ptr, lora_a_ptr, words_ptr, keep_scale, offs_m, tile_k * BLOCK_K, mask_m, K,
            0, R, stride_dhm, stride_ar, stride_ak, dx_ptr.dtype.element_ty, BLOCK_K, BLOCK_R, SPLIT, PRECISION,
        )  # fmt: skip
        for n in range(0, N, BLOCK_N):
            dy = dy_desc.load([tile_m * BLOCK_M, n])  # (BLOCK_M, BLOCK_N)
            w = w_desc.load([n, tile_k * BLOCK_K])  # (BLOCK_N, BLOCK_K)
            acc = dot(dy, w, acc, PRECISION)
        dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
        tl.store(dx_ptrs, rounded(acc, dx_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_k < K)[None, :])


@triton.jit(do_not_specialize=["M"])
def dx_low_rank_kernel(
    dh_ptr,
    lora_a_ptr,
    words_ptr,
    dx_ptr,
    M,
    K,
    STARTS: tl.constexpr,
    keep_scale,
    stride_dhm: tl.constexpr,
    stride_ar,
    stride_ak,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = Σ_i keep_i * keep_scale * (dh_i A_i); one rounding.

    Member i has the columns of dh, and the rows of A, from STARTS[i] to STARTS[i + 1], R = STARTS[-1] in all.

    ======== =========================== =================================
    dh       (M, R) fp32                 rows in one piece, stride_dhm apart
    lora_a   (R, K)                      any strides, any float dtype
    words    (members, M, 4 ceil(K / 128)) int32, contiguous (``packed_mask``); None: nothing is dropped
    dx       (M, K)                      contiguous
    ======== =========================== =================================

    Grid: one program a tile of dx. fp32 accumulation; 2 M K R flops (twice with SPLIT); reads dh and A from L2, writes
    dx.
    """
    tile_m, tile_k = tile_of_program(M, K, BLOCK_M, BLOCK_K, 1)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tile_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_k < K)[None, :]
    dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for i in tl.static_range(len(STARTS) - 1):
        own_words_ptr = words_ptr
        if words_ptr is not None:
            own_words_ptr = words_ptr + tl.full((), i, tl.int64) * M * row_words(K)
        acc += _low_rank(
            dh_ptr, lora_a_ptr, own_words_ptr, keep_scale, offs_m, tile_k * BLOCK_K, mask_m, K,
            STARTS[i], STARTS[i + 1], stride_dhm, stride_ar, stride_ak, dx_ptr.dtype.element_ty,
            BLOCK_K, BLOCK_R, SPLIT, PRECISION,
        )  # fmt: skip
    tl.store(dx_ptrs, rounded(acc, dx_ptr.dtype.element_ty), mask=mask)
