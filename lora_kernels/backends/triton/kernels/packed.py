"""The dropout mask, one bit an element: drawn once from the seed, and read by tiles (``lora_kernels.packed_mask``)."""

import triton
import triton.language as tl

__all__ = ["draw_kernel", "keep_tile", "mask_kernel", "row_words"]


@triton.jit
def row_words(K):
    """int32 words in a row of the packed mask."""
    return 4 * tl.cdiv(K, 128)


@triton.jit
def keep_tile(words_ptr, rows, first_column, mask_m, K, BLOCK_K: tl.constexpr):
    """Which elements of a tile are kept, as booleans (BLOCK_M, BLOCK_K).

    ============== =============================== ====================================
    words          (M, 4 ceil(K / 128)) int32      contiguous
    rows           (BLOCK_M,) int64                row numbers
    first_column   int                             a multiple of BLOCK_K, a power of two
    mask_m         (BLOCK_M,) bool                 which rows are there
    ============== =============================== ====================================

    Each word is loaded once (in a K loop by the pipeline) and broadcast to its 32 columns: the compiler then converts
    the layout of the words, not of the elements. A load for each element would take 4 bytes of shared memory for each.
    Two axes of 8 and 4 columns need two shifts a word in a thread; the rest are constant bits.
    """
    width = row_words(K)
    BLOCK_M: tl.constexpr = rows.shape[0]
    if BLOCK_K < 32:
        columns = first_column + tl.arange(0, BLOCK_K)
        word_ptrs = words_ptr + rows[:, None] * width + (columns // 32)[None, :]
        words = tl.load(word_ptrs, mask=mask_m[:, None] & (columns < K)[None, :], other=0)  # (BLOCK_M, BLOCK_K)
        return (words >> (columns % 32)[None, :]) & 1 != 0
    else:
        offs_w = first_column // 32 + tl.arange(0, BLOCK_K // 32)
        word_ptrs = words_ptr + rows[:, None] * width + offs_w[None, :]
        words = tl.load(word_ptrs, mask=mask_m[:, None] & (offs_w < width)[None, :], other=0)  # (BLOCK_M, BLOCK_K / 32)
        bits = words[:, :, None, None] >> tl.arange(0, 8)[None, None, None, :]
        bits &= (1 << 8 * tl.arange(0, 4))[None, None, :, None]
        return tl.reshape(bits != 0, (BLOCK_M, BLOCK_K))


@triton.jit
def _philox_4x32_7(c0, c1, c2, c3, k0, k1):
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
def _level(kept, drawn, keep16, BIT: tl.constexpr):
    """One binary digit of the probability to keep: P -> (P + digit) / 2, as the majority of three."""
    digit = (0 - ((keep16 >> BIT) & 1)).to(tl.uint32, bitcast=True)
    return (kept & drawn) | (digit & (kept | drawn))


@triton.jit(do_not_specialize=["M", "keep16"])
def draw_kernel(seed_ptr, words_ptr, M, K, keep16, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """The packed mask (M, K) of each member's seed, 32 elements a word, each kept with probability keep16 / 2^16.

    ========= ================================== =============================================
    seed      (members, 2) int64                 contiguous: key and stream
    words     (members, M, 4 ceil(K / 128))      int32, contiguous
    keep16    int32                              1 to 65536; 65536 draws nothing and keeps all
    ========= ================================== =============================================

    Grid (ceil(M / BLOCK_M), ceil(words of a row / BLOCK_W), members), one tile each. Integer arithmetic, about 320
    operations a word; writes M K / 8 bytes a member.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    member = tl.program_id(2).to(tl.int64)
    width = row_words(K)
    key = tl.load(seed_ptr + 2 * member).to(tl.uint64, bitcast=True)
    stream = tl.load(seed_ptr + 2 * member + 1).to(tl.uint64, bitcast=True)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c2, c3 = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    word = offs_w.to(tl.uint32)[None, :] + tl.zeros((BLOCK_M, BLOCK_W), tl.uint32)
    row = rows.to(tl.uint32)[:, None] + tl.zeros((BLOCK_M, BLOCK_W), tl.uint32)
    kept = tl.zeros((BLOCK_M, BLOCK_W), tl.uint32)
    for call in tl.static_range(4):
        r0, r1, r2, r3 = _philox_4x32_7(word * 4 + call, row, c2, c3, k0, k1)
        kept = _level(kept, r0, keep16, 4 * call)
        kept = _level(kept, r1, keep16, 4 * call + 1)
        kept = _level(kept, r2, keep16, 4 * call + 2)
        kept = _level(kept, r3, keep16, 4 * call + 3)
    kept = tl.where(keep16 > 65535, tl.full((), 0xFFFFFFFF, tl.uint32), kept)
    there = K - offs_w * 32  # columns of the word
    last = (tl.full((), 1, tl.uint32) << tl.minimum(tl.maximum(there, 0), 31).to(tl.uint32)) - 1
    kept = tl.where(there[None, :] >= 32, kept, kept & last[None, :])
    word_ptrs = words_ptr + (member * M + rows)[:, None] * width + offs_w[None, :]
    tl.store(word_ptrs, kept.to(tl.int32, bitcast=True), mask=(rows < M)[:, None] & (offs_w < width)[None, :])


@triton.jit(do_not_specialize=["M"])
def mask_kernel(words_ptr, keep_ptr, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep[m, k] = bit k % 32 of words[m, k // 32].

    ========= ============================ ============
    words     (M, 4 ceil(K / 128)) int32   contiguous
    keep      (M, K) bool                  contiguous
    ========= ============================ ============

    Grid (ceil(M / BLOCK_M), ceil(K / BLOCK_K)), one tile each. Reads M K / 8 bytes, writes M K.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1) * BLOCK_K
    offs_k = first_column + tl.arange(0, BLOCK_K)
    keep = keep_tile(words_ptr, offs_m, first_column, offs_m < M, K, BLOCK_K)
    keep_ptrs = keep_ptr + offs_m[:, None] * K + offs_k[None, :]
    tl.store(keep_ptrs, keep, mask=(offs_m < M)[:, None] & (offs_k < K)[None, :])
