// A weight of 4-bit codes: a block's values, how codes look them up, and bitsandbytes' two orders of them.
//
// Value i of W, its rows one after the other, is table[code i] * absmax[i / blocksize], rounded to E. A block has one
// absmax, so its 16 values are made and rounded once, and a code looks its value up.
#pragma once

#include "few.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

constexpr int CODES = 16;
constexpr int64_t CODE_UNIT = 32;  // blocks are multiples of it, and so is k of a product

#if LORA_VECTOR_BYTES == 64
constexpr int CODE_ROWS = 4;
#else
constexpr int CODE_ROWS = 2;
#endif

// A block's 16 values, rounded to E.
template <class E>
struct BlockValues {
    static constexpr int PARTS = CODES / lanes<float>;
    FloatVector parts[PARTS];

    __attribute__((always_inline)) BlockValues(const float* table, float absmax) {
#pragma GCC unroll 4
        for (int i = 0; i < PARTS; ++i) {
            parts[i] = load(table + i * lanes<float>) * absmax;
            if constexpr (sizeof(E) == 2) {
                E rounded[lanes<float>];
                store(parts[i], rounded);
                parts[i] = load(rounded);
            }
        }
    }

    // Of the low four bits of each lane.
    __attribute__((always_inline)) FloatVector operator[](WordVector code) const {
#if defined(__AVX512F__) && LORA_VECTOR_BYTES == 64
        return (FloatVector)_mm512_maskz_permutexvar_ps(0xFFFF, (__m512i)code, (__m512)parts[0]);
#elif defined(__AVX2__) && LORA_VECTOR_BYTES == 32
        const __m256 low = _mm256_permutevar8x32_ps((__m256)parts[0], (__m256i)code);
        const __m256 high = _mm256_permutevar8x32_ps((__m256)parts[1], (__m256i)code);
        return (FloatVector)_mm256_blendv_ps(low, high, (__m256)(code << 28));
#else
        float values[CODES];
        __builtin_memcpy(values, parts, sizeof values);
        FloatVector found;
        for (int i = 0; i < lanes<float>; ++i) found[i] = values[code[i] & 15u];
        return found;
#endif
    }
};

// Where E has 16 bits and a vector 32 of them, a block's values in both halves of it: the fifth bit of an index, which
// is the next code's, does not matter then.
#if LORA_VECTOR_BYTES == 64 && defined(__AVX512BW__)
#define LORA_HALF_LOOKUP 1
template <class E>
LORA_INLINE __m512i half_values(const float* table, float absmax) {
    const FloatVector values = load(table) * absmax;
    E rounded[CODES];
#if defined(__AVX512BF16__)
    if constexpr (__is_same(E, bf16)) {
        write(rounded, _mm512_cvtneps_pbh((__m512)values));
    } else {
        store(values, rounded);
    }
#else
    store(values, rounded);
#endif
    return _mm512_maskz_broadcast_i64x4(0xFF, read<__m256i>(rounded));
}
LORA_INLINE __m512i look_up(__m512i values, __m512i codes) {
    return _mm512_maskz_permutexvar_epi16(0xFFFFFFFFu, codes, values);
}
LORA_INLINE __m512i widen_codes(const uint8_t* p) { return _mm512_maskz_cvtepu8_epi16(0xFFFFFFFFu, read<__m256i>(p)); }
LORA_INLINE __m512i next_codes(__m512i bytes) { return _mm512_maskz_srli_epi16(0xFFFFFFFFu, bytes, 4); }
#else
#define LORA_HALF_LOOKUP 0
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

// `count` values of one absmax.
template <class E>
LORA_INLINE void block_values(const float* table, float absmax, const uint8_t* codes, int64_t count, E* to) {
    int64_t at = 0;
#if LORA_HALF_LOOKUP
    if constexpr (sizeof(E) == 2) {
        const __m512i values = half_values<E>(table, absmax);
        for (; at + 32 <= count; at += 32) {
            const WordVector bytes = widen_bytes(codes + at / 2);
            write(to + at, look_up(values, (__m512i)((bytes >> 4) | (bytes << 16))));
        }
        if (at == count) return;
    }
#endif
    constexpr int VL = lanes<float>;
    const BlockValues<E> values(table, absmax);
    for (; at + 2 * VL <= count; at += 2 * VL) {
        const WordVector bytes = widen_bytes(codes + at / 2);
        const FloatVector even = values[bytes >> 4], odd = values[bytes];
        store(interleave<0>(even, odd), to + at);
        store(interleave<1>(even, odd), to + at + VL);
    }
    float scaled[CODES];
    __builtin_memcpy(scaled, values.parts, sizeof scaled);
    for (; at < count; ++at) narrow(scaled[at % 2 == 0 ? codes[at / 2] >> 4 : codes[at / 2] & 15], to + at);
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
            block_values(w.table, absmax[i], codes + (at - first) / 2, stop - at, to + (at - first));
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
