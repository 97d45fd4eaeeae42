# mypy: ignore-errors
"""Device code of the rival's backward, written anew from its description; forward's is in ``kernels``.

As forward it is cut at the tensors of rank R: one read of dy gives dh and db, whose sums over N and M are added by
atomics; da comes from the library, of the x that forward dropped and kept; and the product for dx begins with the
masked low-rank term, by the mask that was kept.
"""

import triton
import triton.language as tl

from .kernels import _tile

__all__ = ["dx_product_kernel", "dx_product_tma_kernel", "hidden_kernel"]


@triton.jit
def hidden_kernel(
    dy_ptr,
    b_ptr,
    h_ptr,
    dh_ptr,
    db_ptr,
    M,
    N,
    scaling,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dh += s dy B and db += s dyᵀ h, both fp32 and zero before; dy (M, N), B (N, R), h (M, R) of one dtype.

    All contiguous. Grid (ceil(M / BLOCK_M), ceil(N / BLOCK_N)).
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, R)
    mask_m, mask_n = (offs_m < M)[:, None], (offs_n < N)[:, None]
    dy_ptrs = dy_ptr + offs_m[:, None] * N + offs_n[None, :]
    dy = tl.load(dy_ptrs, mask=mask_m & (offs_n < N)[None, :], other=0.0)  # (BLOCK_M, BLOCK_N)
    b = tl.load(b_ptr + offs_n[:, None] * R + offs_r[None, :], mask=mask_n, other=0.0)  # (BLOCK_N, R)
    h = tl.load(h_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_m, other=0.0)  # (BLOCK_M, R)
    dh = tl.dot(dy, b) * scaling
    tl.atomic_add(dh_ptr + offs_m[:, None] * R + offs_r[None, :], dh, mask=mask_m, sem="relaxed")
    db = tl.dot(tl.trans(dy), h) * scaling
    tl.atomic_add(db_ptr + offs_n[:, None] * R + offs_r[None, :], db, mask=mask_n, sem="relaxed")


@triton.jit
def _masked_low_rank(
    dh_ptr, a_ptr, mask_ptr, scale, offs_m, offs_k, M, K, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """scale mask (dh A) of a tile in fp32; 16 ranks at a time."""
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    mask_m, mask_k = (offs_m < M)[:, None], (offs_k < K)[None, :]
    for r in tl.range(0, R, 16, num_stages=1):
        offs_r = r + tl.arange(0, 16)
        dh = tl.load(dh_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_m, other=0.0)  # (BLOCK_M, 16)
        a = tl.load(a_ptr + offs_r[:, None] * K + offs_k[None, :], mask=mask_k, other=0.0)  # (16, BLOCK_K)
        acc = tl.dot(dh, a, acc)
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + offs_m[:, None] * K + offs_k[None, :], mask=mask_m & mask_k, other=0)
        acc *= kept.to(tl.float32) * scale
    return acc


@triton.jit
def dx_product_kernel(
    dy_ptr,
    weight_ptr,
    dh_ptr,
    a_ptr,
    mask_ptr,
    dx_ptr,
    M,
    N,
    K,
    scale,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """dx = dy W + scale mask (dh A), one program a tile; all contiguous and of one dtype, the mask (M, K) int8 or None.

    BLOCK_N is the step of the sum.
    """
    tile_m, tile_k = _tile(tl.program_id(0), M, K, BLOCK_M, BLOCK_K, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tile_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    acc = _masked_low_rank(dh_ptr, a_ptr, mask_ptr, scale, offs_m, offs_k, M, K, R, BLOCK_M, BLOCK_K)
    dy_ptrs = dy_ptr + offs_m[:, None] * N + offs_n[None, :]
    w_ptrs = weight_ptr + offs_n[:, None] * K + offs_k[None, :]
    for n in range(0, N, BLOCK_N):
        left = offs_n < N - n
        dy = tl.load(dy_ptrs, mask=(offs_m[:, None] < M) & left[None, :], other=0.0)  # (BLOCK_M, BLOCK_N)
        w = tl.load(w_ptrs, mask=left[:, None] & (offs_k[None, :] < K), other=0.0)  # (BLOCK_N, BLOCK_K)
        acc = tl.dot(dy, w, acc)
        dy_ptrs += BLOCK_N
        w_ptrs += BLOCK_N * K
    dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_k[None, :] < K))


@triton.jit
def dx_product_tma_kernel(
    dy_ptr,
    weight_ptr,
    dh_ptr,
    a_ptr,
    mask_ptr,
    dx_ptr,
    M,
    N,
    K,
    scale,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """The same, persistent: PROGRAMS programs take the tiles in turn, and dy, W and dx move through descriptors."""
    dy_desc = tl.make_tensor_descriptor(dy_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    w_desc = tl.make_tensor_descriptor(weight_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    dx_desc = tl.make_tensor_descriptor(dx_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_K)
    for pid in tl.range(tl.program_id(0), tiles, PROGRAMS):
        tile_m, tile_k = _tile(pid, M, K, BLOCK_M, BLOCK_K, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_k * BLOCK_K
        offs_m = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        offs_k = column.to(tl.int64) + tl.arange(0, BLOCK_K)
        acc = _masked_low_rank(dh_ptr, a_ptr, mask_ptr, scale, offs_m, offs_k, M, K, R, BLOCK_M, BLOCK_K)
        for n in tl.range(0, N, BLOCK_N):
            dy = dy_desc.load([row, n])  # (BLOCK_M, BLOCK_N)
            w = w_desc.load([n, column])  # (BLOCK_N, BLOCK_K)
            acc = tl.dot(dy, w, acc)
        dx_desc.store([row, column], acc.to(dx_ptr.dtype.element_ty))
