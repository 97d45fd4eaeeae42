// How 4-bit codes look a block's values up: 16 values of one absmax, made and rounded once.
#pragma once

#include "few.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

constexpr int CODES = 16;

#if defined(__AVX2__) && LORA_VECTOR_BYTES == 32

// A block's values as planes: plane i has byte i of each value's 32 bits, in both halves of the vector. A byte shuffle
// looks 32 codes up in one plane. Bytes before FIRST are zero.
template <int FIRST>
struct BytePlanes {
    __m256i planes[4];

    __attribute__((always_inline)) BytePlanes(WordVector low, WordVector high) {
        const __m256i by_byte = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1,
                                                 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m256i even = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5), odd = _mm256_setr_epi32(2, 6, 3, 7, 2, 6, 3, 7);
        const __m256i first = _mm256_shuffle_epi8((__m256i)low, by_byte);
        const __m256i second = _mm256_shuffle_epi8((__m256i)high, by_byte);
        const __m256i lower = _mm256_unpacklo_epi32(first, second), upper = _mm256_unpackhi_epi32(first, second);
        planes[0] = FIRST > 0 ? _mm256_setzero_si256() : _mm256_permutevar8x32_epi32(lower, even);
        planes[1] = FIRST > 1 ? _mm256_setzero_si256() : _mm256_permutevar8x32_epi32(lower, odd);
        planes[2] = _mm256_permutevar8x32_epi32(upper, even);
        planes[3] = _mm256_permutevar8x32_epi32(upper, odd);
    }

    __attribute__((always_inline)) __m256i bytes(int plane, __m256i codes) const {
        return plane < FIRST ? _mm256_setzero_si256() : _mm256_shuffle_epi8(planes[plane], codes);
    }
    // The lower (0) or upper (1) half of each 16 values: their lower 16 bits (0) or their upper (2).
    template <int HALF>
    __attribute__((always_inline)) __m256i halves(int plane, __m256i codes) const {
        const __m256i low = bytes(plane, codes), high = bytes(plane + 1, codes);
        return HALF == 0 ? _mm256_unpacklo_epi8(low, high) : _mm256_unpackhi_epi8(low, high);
    }
};

// v rounded to E: 16-bit ones in the upper half of each lane, and what is below a bf16 does not matter.
template <class E>
LORA_INLINE WordVector rounded_words(FloatVector v) {
    const WordVector bits = (WordVector)v;
    if constexpr (sizeof(E) == 4) return bits;
    if constexpr (__is_same(E, fp16)) {
        const __m128i halves = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
        return (WordVector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
    }
    const WordVector nan = (WordVector)(v != v), rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    return (WordVector)_mm256_blendv_epi8((__m256i)rounded, _mm256_set1_epi32(0x7FC00000), (__m256i)nan);
}

// A block's values, widened, in the order in which they are found.
template <class E>
struct CodeLookup {
    static constexpr int VECTORS = 4, COLUMNS = VECTORS * lanes<float>;  // of a step
    static constexpr int FIRST = __is_same(E, bf16) ? 2 : __is_same(E, fp16) ? 1 : 0;

    BytePlanes<FIRST> values;

    static WordVector words(FloatVector v) {
        if constexpr (__is_same(E, fp16))
            return (WordVector)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
        return rounded_words<E>(v);
    }
    __attribute__((always_inline)) CodeLookup(const float* table, float absmax)
        : values(words(load(table) * absmax), words(load(table + lanes<float>) * absmax)) {}

    // Position p of a step is this column of it: even columns are in the lower halves of the vectors.
    static int column(int p) {
        const int vector = p / lanes<float>, lane = p % lanes<float>, half = lanes<float> / 2;
        const int code = vector / 2 * 8 + lane % half * 2 + vector % 2;
        return 2 * code + lane / half;
    }
    __attribute__((always_inline)) void step(const uint8_t* codes, FloatVector (&out)[VECTORS]) const {
        const __m256i both = _mm256_broadcastsi128_si256(read<__m128i>(codes));
        const __m256i index =
            _mm256_and_si256(_mm256_srlv_epi32(both, _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0)), _mm256_set1_epi8(15));
        pair(values.template halves<0>(2, index), values.template halves<0>(0, index), out[0], out[1]);
        pair(values.template halves<1>(2, index), values.template halves<1>(0, index), out[2], out[3]);
    }

  private:
    // The values whose upper and lower 16 bits these are: the even ones, the odd ones.
    static __attribute__((always_inline)) void pair(__m256i upper, __m256i lower, FloatVector& even, FloatVector& odd) {
        const __m256i shifted = _mm256_slli_epi32(upper, 16);
        if constexpr (FIRST == 2) {
            even = (FloatVector)shifted, odd = (FloatVector)((WordVector)upper & 0xFFFF0000u);
        } else {
            even = (FloatVector)_mm256_blend_epi16(lower, shifted, 0xAA);
            odd = (FloatVector)_mm256_blend_epi16(_mm256_srli_epi32(lower, 16), upper, 0xAA);
        }
    }
};

// A block's values as E, in the order of their codes.
template <class E>
struct CodeValues {
    static constexpr int COLUMNS = 32;  // of a step
    static constexpr bool HALVES = sizeof(E) == 2;

    BytePlanes<HALVES ? 2 : 0> values;

    __attribute__((always_inline)) CodeValues(const float* table, float absmax)
        : values(rounded_words<E>(load(table) * absmax), rounded_words<E>(load(table + lanes<float>) * absmax)) {}

    template <bool LOW_FIRST>
    __attribute__((always_inline)) void step(const uint8_t* codes, E* to) const {
        // Bytes that are to be side by side in a vector lie as far apart as its unpacking takes them.
        const __m128i order = HALVES ? _mm_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15)
                                     : _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        const __m256i bytes = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(read<__m128i>(codes), order));
        const __m256i both = LOW_FIRST ? _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4))
                                       : _mm256_or_si256(_mm256_srli_epi16(bytes, 4), _mm256_slli_epi16(bytes, 8));
        const __m256i index = _mm256_and_si256(both, _mm256_set1_epi8(15));
        const __m256i low = values.template halves<0>(2, index), high = values.template halves<1>(2, index);
        if constexpr (HALVES) {
            write(to, low);
            write(to + 16, high);
        } else {
            const __m256i below = values.template halves<0>(0, index), above = values.template halves<1>(0, index);
            write(to, _mm256_unpacklo_epi16(below, low));
            write(to + 8, _mm256_unpackhi_epi16(below, low));
            write(to + 16, _mm256_unpacklo_epi16(above, high));
            write(to + 24, _mm256_unpackhi_epi16(above, high));
        }
    }
};

#else

// A block's values, widened, in the order in which they are found.
template <class E>
struct CodeLookup {
    static constexpr int VECTORS = 2, COLUMNS = VECTORS * lanes<float>;  // of a step
    static constexpr int PARTS = CODES / lanes<float>;

    FloatVector parts[PARTS];

    __attribute__((always_inline)) CodeLookup(const float* table, float absmax) {
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
#else
        float values[CODES];
        __builtin_memcpy(values, parts, sizeof values);
        FloatVector found;
        for (int i = 0; i < lanes<float>; ++i) found[i] = values[code[i] & 15u];
        return found;
#endif
    }

    // Position p of a step is this column of it: the even columns come first.
    static int column(int p) { return p < lanes<float> ? 2 * p : 2 * (p - lanes<float>)+1; }
    __attribute__((always_inline)) void step(const uint8_t* codes, FloatVector (&out)[VECTORS]) const {
        const WordVector bytes = widen_bytes(codes);
        out[0] = (*this)[bytes >> 4], out[1] = (*this)[bytes];
    }
};

// A block's values as E, in the order of their codes.
template <class E>
struct CodeValues {
    static constexpr int COLUMNS = CodeLookup<E>::COLUMNS;  // of a step

    CodeLookup<E> values;

    __attribute__((always_inline)) CodeValues(const float* table, float absmax) : values(table, absmax) {}

    template <bool LOW_FIRST>
    __attribute__((always_inline)) void step(const uint8_t* codes, E* to) const {
        FloatVector found[2];
        values.step(codes, found);
        const FloatVector even = found[LOW_FIRST ? 1 : 0], odd = found[LOW_FIRST ? 0 : 1];
        store(interleave<0>(even, odd), to);
        store(interleave<1>(even, odd), to + lanes<float>);
    }
};

#endif

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

// `count` values of one absmax, in their order; LOW_FIRST: the first of two codes is in the lower half of their byte.
template <class E, bool LOW_FIRST>
LORA_INLINE void block_values(const float* table, float absmax, const uint8_t* codes, int64_t count, E* to) {
    int64_t at = 0;
#if LORA_HALF_LOOKUP
    if constexpr (sizeof(E) == 2) {
        const __m512i values = half_values<E>(table, absmax);
        for (; at + 32 <= count; at += 32) {
            const WordVector bytes = widen_bytes(codes + at / 2);
            write(to + at,
                  look_up(values, (__m512i)(LOW_FIRST ? bytes | (bytes << 12) : (bytes >> 4) | (bytes << 16))));
        }
        if (at == count) return;
    }
#endif
    constexpr int STEP = CodeValues<E>::COLUMNS;
    const CodeValues<E> values(table, absmax);
    for (; at + STEP <= count; at += STEP) values.template step<LOW_FIRST>(codes + at / 2, to + at);
    if (at == count) return;
    uint8_t rest[STEP / 2] = {};
    E found[STEP];
    __builtin_memcpy(rest, codes + at / 2, static_cast<size_t>(count - at + 1) / 2);
    values.template step<LOW_FIRST>(rest, found);
    __builtin_memcpy(to + at, found, static_cast<size_t>(count - at) * sizeof(E));
}

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
