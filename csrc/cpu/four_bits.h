// A weight of 4-bit codes: its statistics, its values, and bitsandbytes' two orders of codes.
//
// Value i of W, its rows one after the other, is table[code i] * absmax[i / blocksize], rounded to E.
#pragma once

#include "code_lookup.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

constexpr int64_t CODE_UNIT = 32;  // blocks are multiples of it, and so is k of a product

#if LORA_VECTOR_BYTES == 64
constexpr int CODE_ROWS = 4;
#else
constexpr int CODE_ROWS = 2;
#endif

// table[index] of each lane.
LORA_INLINE FloatVector gather(const float* table, WordVector index) {
#if defined(__AVX512F__) && LORA_VECTOR_BYTES == 64
    return (FloatVector)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xFFFF, (__m512i)index, table, 4);
#elif defined(__AVX2__) && LORA_VECTOR_BYTES == 32
    return (FloatVector)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    FloatVector found;
    for (int i = 0; i < lanes<float>; ++i) found[i] = table[index[i]];
    return found;
#endif
}

// v, of which the compiler may not know that it was a product: a sum with it is not made a multiply-add.
template <class V>
LORA_INLINE V rounded(V v) {
#if defined(__AVX512F__) || (defined(__AVX2__) && LORA_VECTOR_BYTES == 32) || \
    (defined(__x86_64__) && LORA_VECTOR_BYTES == 16)
    __asm__("" : "+x"(v));  // a vector is a register
#else
    __asm__("" : "+m"(v));
#endif
    return v;
}

// The absmax of blocks first .. first + count. A nested one is made in two steps, each rounded, as its package does.
LORA_INLINE const float* statistics(const FourBits& w, int64_t first, int64_t count, float* made) {
    if (w.by_columns != nullptr) {
        const int64_t width = w.k / w.blocksize;  // whole blocks
        int64_t row = first / width, at = first % width;
        for (int64_t i = 0; i < count; ++i, ++at) {
            if (at == width) at = 0, ++row;
            made[i] = widen(bf16{w.by_columns[at * w.n + row]});
        }
        return made;
    }
    if (w.nested == nullptr) return w.absmax + first;
    for (int64_t i = 0; i < count;) {
        const int64_t block = (first + i) / w.nested_blocksize;
        const int64_t end = least(count, (block + 1) * w.nested_blocksize - first);
        const float absmax = w.nested_absmax[block];
        for (; i + lanes<float> <= end; i += lanes<float>)
            store(rounded(gather(w.nested_table, widen_bytes(w.nested + first + i)) * absmax) + w.offset, made + i);
        for (; i < end; ++i) made[i] = rounded(w.nested_table[w.nested[first + i]] * absmax) + w.offset;
    }
    return made;
}

// Values first .. end, the first an even one, whose codes begin at `codes`.
template <class E>
LORA_INLINE void four_bit_values(const FourBits& w, int64_t first, int64_t end, const uint8_t* codes, E* to) {
    constexpr int64_t BLOCKS = 64;  // whose statistics are made at a time
    float made[BLOCKS];
    int64_t at = first;
    for (int64_t block = first / w.blocksize; at < end; block += BLOCKS) {
        const int64_t count = least(BLOCKS, ceil_div(end, w.blocksize) - block);
        const float* absmax = statistics(w, block, count, made);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t stop = least(end, (block + i + 1) * w.blocksize);
            const uint8_t* own = codes + (at - first) / 2;
            E* out = to + (at - first);
            w.low_first ? block_values<E, true>(w.table, absmax[i], own, stop - at, out)
                        : block_values<E, false>(w.table, absmax[i], own, stop - at, out);
            at = stop;
        }
    }
}

constexpr int64_t BLOCK_ROWS = 32;  // of the order by columns

// Codes of such a block in the order of rows, two a byte: `pairs` pairs of columns, out (32, pairs) bytes.
static inline void codes_by_rows(const uint8_t* block, int64_t pairs, uint8_t* out) {
    constexpr int VL = lanes<float>, HALF = BLOCK_ROWS / 2, BYTES = 4;  // of a lane
    const auto first = [](WordVector two) { return ((two << 4) & 0xF0u) | ((two >> 8) & 0xFu); };
    const auto second = [](WordVector two) { return (two & 0xF0u) | (two >> 12); };
    int64_t at = 0;
    for (; at + BYTES * VL <= pairs; at += BYTES * VL) {
        for (int row = 0; row < HALF; row += VL) {
            FloatVector upper[VL], lower[VL];
            for (int i = 0; i < VL; ++i) {
                WordVector low = {}, high = {};
#pragma GCC unroll 4
                for (int q = 0; q < BYTES; ++q) {
                    const uint8_t* from = block + (at + BYTES * i + q) * BLOCK_ROWS + 2 * row;
                    const WordVector two = widen_bits(reinterpret_cast<const uint16_t*>(from));
                    low |= first(two) << (8 * q), high |= second(two) << (8 * q);
                }
                upper[i] = (FloatVector)low, lower[i] = (FloatVector)high;
            }
            transpose_square<float>(upper);
            transpose_square<float>(lower);
            for (int i = 0; i < VL; ++i) {
                write(out + (row + i) * pairs + at, upper[i]);
                write(out + (HALF + row + i) * pairs + at, lower[i]);
            }
        }
    }
    for (; at < pairs; ++at) {
        for (int row = 0; row < HALF; ++row) {
            const uint8_t even = block[at * BLOCK_ROWS + 2 * row], odd = block[at * BLOCK_ROWS + 2 * row + 1];
            out[row * pairs + at] = static_cast<uint8_t>((even << 4) | (odd & 0xF));
            out[(HALF + row) * pairs + at] = static_cast<uint8_t>((even & 0xF0) | (odd >> 4));
        }
    }
}

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
