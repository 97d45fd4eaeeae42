"""The dropout mask, regenerated from the seed: bit for bit ``reference.philox_keep_mask``."""

import triton
import triton.language as tl

__all__ = ["keep_tile", "load_seed", "mask_kernel"]


@triton.jit
def load_seed(seed_ptr):
    """The four 32-bit words of the int64 (2,) seed: key low, key high, stream low, stream high."""
    key = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    stream = tl.load(seed_ptr + 1).to(tl.uint64, bitcast=True)
    return key.to(tl.uint32), (key >> 32).to(tl.uint32), stream.to(tl.uint32), (stream >> 32).to(tl.uint32)


@triton.jit
def philox_4x32_7(c0, c1, c2, c3, k0, k1):
    """Seven rounds of Philox4x32 (Salmon et al., 2011) on uint32 counters and keys."""
    multiplier_0 = tl.full((), 0xD2511F53, tl.uint32)
    multiplier_1 = tl.full((), 0xCD9E8D57, tl.uint32)
    weyl_0 = tl.full((), 0x9E3779B9, tl.uint32)
    weyl_1 = tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(7):
        high_0, low_0 = tl.umulhi(c0, multiplier_0), c0 * multiplier_0
        high_1, low_1 = tl.umulhi(c2, multiplier_1), c2 * multiplier_1
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 = k0 + weyl_0
        k1 = k1 + weyl_1
    return c0, c1, c2, c3


@triton.jit
def keep_tile(seed, rows, first_column, groups, threshold, BLOCK_K: tl.constexpr):
    """Which elements of a tile are kept, as booleans (BLOCK_M, BLOCK_K).

    One Philox call yields eight consecutive elements of a row, 16 bits each; an element is kept where its bits are at
    least ``threshold``. The words are joined so that the last axes count 2 word + half = column % 8.

    ============== ======================= ====================================================
    seed           four uint32 scalars     from ``load_seed``
    rows           (BLOCK_M,) int64        row numbers
    first_column   int                     a multiple of 8; BLOCK_K is one too
    groups         int                     ceil(K / 8), the counters that a row takes
    ============== ======================= ====================================================
    """
    k0, k1, c2, c3 = seed
    BLOCK_M: tl.constexpr = rows.shape[0]
    columns = first_column // 8 + tl.arange(0, BLOCK_K // 8)
    counter = rows.to(tl.int64)[:, None] * groups + columns.to(tl.int64)[None, :]  # (BLOCK_M, BLOCK_K / 8)
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox_4x32_7(c0, c1, c2, c3, k0, k1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_M, BLOCK_K / 8, 2, 2)
    halves = tl.join(words & 0xFFFF, words >> 16)  # (BLOCK_M, BLOCK_K / 8, 2, 2, 2)
    return tl.reshape(halves.to(tl.int32) >= threshold, (BLOCK_M, BLOCK_K))


@triton.jit(do_not_specialize=["M", "threshold"])
def mask_kernel(seed_ptr, keep_ptr, M, K, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep[m, k] = bits(m, k) >= threshold.

    ========= ============ =============
    seed      (2,) int64   contiguous
    keep      (M, K) bool  contiguous
    ========= ============ =============

    Grid (ceil(M / BLOCK_M), ceil(K / BLOCK_K)), one tile each. Integer arithmetic; writes M K bytes.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1) * BLOCK_K
    offs_k = first_column + tl.arange(0, BLOCK_K)
    keep = keep_tile(load_seed(seed_ptr), offs_m, first_column, tl.cdiv(K, 8), threshold, BLOCK_K)
    keep_ptrs = keep_ptr + offs_m[:, None] * K + offs_k[None, :]
    tl.store(keep_ptrs, keep, mask=(offs_m < M)[:, None] & (offs_k < K)[None, :])
