"""The forward product on Hopper and later: operands by TMA, programs that stay and walk the tiles."""

import triton
import triton.language as tl

from .common import add_low_rank, dot, store_output, tile_at, wait_for_previous

__all__ = ["persistent_kernel"]


@triton.jit(do_not_specialize=["M"])
def persistent_kernel(
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
    stride_wn,
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
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """l = x Wᵀ + scaling h Bᵀ and y = l + bias, or with a gain y = gain * l + bias; one rounding each.

    ======== ========================= ===========================================================
    x        (M, K), 16-bit            rows contiguous and, as the storage, on 16-byte boundaries
    weight   (N, K), 16-bit            rows contiguous and, as the storage, on 16-byte boundaries
    lora_b   (N, R)                    any strides, any float dtype
    bias     (N,) or None              any stride, any float dtype
    gain     (N,) fp32 or None         any stride
    h        (PARTS, M, R) fp32        rows in one piece, stride_hm apart; with OPERAND and one part (M, 2 OPERAND) bf16
    h_sum    (M, R) fp32 or None       contiguous; Σ h, where PARTS > 1; with OPERAND (M, 2 OPERAND) bf16
    y        (M, N)                    contiguous
    linear   (M, N) or None            contiguous; l
    ======== ========================= ===========================================================

    Grid (programs): each takes every (number of programs)-th tile of y, in ``tile_at``'s order. The descriptors are
    made once a program. h is first read after the first tile's K loop, so that with PDL the shrink kernel still runs
    meanwhile. fp32 accumulation; 2 M N K + 2 M N R flops (the latter twice with SPLIT); reads x, W, h, B, writes y.
    """
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    w_desc = tl.make_tensor_descriptor(weight_ptr, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([tile_m * BLOCK_M, k])  # (BLOCK_M, BLOCK_K)
            w = w_desc.load([tile_n * BLOCK_N, k])  # (BLOCK_N, BLOCK_K)
            acc = dot(x, w.T, acc, PRECISION)
        wait_for_previous(PDL)
        offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m = offs_m < M
        mask_n = offs_n < N
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
