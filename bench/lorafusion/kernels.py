# mypy: ignore-errors
"""Device code of the rival whose kernels are split at h, written anew from its published description.

LoRAFusion (arXiv 2510.00206) cuts the layer at the tensors of rank R: a kernel that drops and keeps the mask, h by the
library, and a product whose accumulator begins with the low-rank term. Tiles are those that it names for an H100.
"""

import triton
import triton.language as tl

__all__ = ["drop_kernel", "product_kernel", "product_tma_kernel"]


@triton.jit(do_not_specialize=["seed"])
def drop_kernel(x_ptr, dropped_ptr, mask_ptr, elements, p, seed, BLOCK: tl.constexpr):
    """dropped = mask * x / (1 - p), and the mask, one byte an element; Philox of 7 rounds, four values a call.

    Grid (ceil(elements / (4 BLOCK))). x, dropped, mask: contiguous.
    """
    start = tl.program_id(0).to(tl.int64) * (4 * BLOCK)
    offs = tl.arange(0, BLOCK)
    counters = (tl.program_id(0) * BLOCK + offs).to(tl.uint32)
    draws = tl.rand4x(seed, counters, n_rounds=7)
    scale = 1.0 / (1.0 - p)
    for part in tl.static_range(4):
        at = start + part * BLOCK + offs
        x = tl.load(x_ptr + at, mask=at < elements, other=0.0)  # (BLOCK,)
        keep = draws[part] > p
        tl.store(dropped_ptr + at, tl.where(keep, x * scale, 0.0).to(x.dtype), mask=at < elements)
        tl.store(mask_ptr + at, keep.to(tl.int8), mask=at < elements)


@triton.jit
def _tile(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    tiles_m = tl.cdiv(M, BLOCK_M)
    in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = pid // in_group * GROUP_M
    size = min(tiles_m - first, GROUP_M)
    return first + pid % in_group % size, pid % in_group // size


@triton.jit
def _low_rank(
    h_ptr, b_ptr, scaling, offs_m, offs_n, M, N, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """h (s B)ᵀ of a tile in fp32, s B rounded to B's dtype; 16 ranks at a time, so that large ranks have room too."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in tl.range(0, R, 16, num_stages=1):
        offs_r = r + tl.arange(0, 16)
        h = tl.load(h_ptr + offs_m[:, None] * R + offs_r[None, :], mask=offs_m[:, None] < M, other=0.0)  # (BLOCK_M, 16)
        b = tl.load(b_ptr + offs_n[None, :] * R + offs_r[:, None], mask=offs_n[None, :] < N, other=0.0)  # (16, BLOCK_N)
        acc = tl.dot(h, (b * scaling).to(h.dtype), acc)
    return acc


@triton.jit
def product_kernel(
    x_ptr,
    weight_ptr,
    h_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    scaling,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = x Wᵀ + h (s B)ᵀ, one program a tile; x (M, K), W (N, K), h (M, R), B (N, R), all contiguous, of one dtype."""
    tile_m, tile_n = _tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    acc = _low_rank(h_ptr, b_ptr, scaling, offs_m, offs_n, M, N, R, BLOCK_M, BLOCK_N)
    x_ptrs = x_ptr + offs_m[:, None] * K + offs_k[None, :]
    w_ptrs = weight_ptr + offs_n[None, :] * K + offs_k[:, None]
    for k in range(0, K, BLOCK_K):
        left = K - k
        x = tl.load(x_ptrs, mask=(offs_m[:, None] < M) & (offs_k[None, :] < left), other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptrs, mask=(offs_n[None, :] < N) & (offs_k[:, None] < left), other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


@triton.jit
def product_tma_kernel(
    x_ptr,
    weight_ptr,
    h_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    scaling,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """The same, persistent: PROGRAMS programs take the tiles in turn, and x, W and y move through descriptors."""
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    w_desc = tl.make_tensor_descriptor(weight_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    y_desc = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for pid in tl.range(tl.program_id(0), tiles, PROGRAMS):
        tile_m, tile_n = _tile(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        offs_m = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        offs_n = column.to(tl.int64) + tl.arange(0, BLOCK_N)
        acc = _low_rank(h_ptr, b_ptr, scaling, offs_m, offs_n, M, N, R, BLOCK_M, BLOCK_N)
        for k in tl.range(0, K, BLOCK_K):
            x = x_desc.load([row, k])  # (BLOCK_M, BLOCK_K)
            w = w_desc.load([column, k])  # (BLOCK_N, BLOCK_K)
            acc = tl.dot(x, w.T, acc)
        y_desc.store([row, column], acc.to(y_ptr.dtype.element_ty))
