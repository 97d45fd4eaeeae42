// Vectors of one instruction set: loads that widen to the accumulation type, stores that round once.
//
// The vector extensions of GCC and Clang say everything once for every width; intrinsics only where the compiler finds
// no single instruction (half precision, widening 16 to 32 bits, 32x32->64 products).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef LORA_VECTOR_BYTES
#if defined(__AVX512F__)
#define LORA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LORA_VECTOR_BYTES 32
#else
#define LORA_VECTOR_BYTES 16
#endif
#endif

#define LORA_INLINE static inline __attribute__((always_inline))

namespace lora_kernels {
namespace LORA_CAPABILITY {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

typedef float FloatVector __attribute__((vector_size(LORA_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(LORA_VECTOR_BYTES)));
typedef uint32_t WordVector __attribute__((vector_size(LORA_VECTOR_BYTES)));
typedef uint64_t LongVector __attribute__((vector_size(LORA_VECTOR_BYTES)));
typedef int32_t SignedWords __attribute__((vector_size(LORA_VECTOR_BYTES)));
typedef int64_t SignedLongs __attribute__((vector_size(LORA_VECTOR_BYTES)));
typedef uint16_t HalfWidthWords __attribute__((vector_size(LORA_VECTOR_BYTES / 2)));

template <class T>
struct Types;
template <>
struct Types<float> {
    typedef FloatVector vector;
};
template <>
struct Types<double> {
    typedef DoubleVector vector;
};
template <class T>
using Vector = typename Types<T>::vector;
template <class T>
constexpr int lanes = LORA_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class V, class P>
LORA_INLINE V read(const P* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class V, class P>
LORA_INLINE void write(P* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

// Scalars.
LORA_INLINE float widen(float value) { return value; }
LORA_INLINE double widen(double value) { return value; }
LORA_INLINE float widen(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    return read<float>(&bits);
}
LORA_INLINE float widen(fp16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t rest = value.bits & 0x7FFFu;
    uint32_t bits;
    if (rest >= 0x7C00u) {
        bits = sign | 0x7F800000u | ((rest & 0x3FFu) << 13);
    } else if (rest >= 0x0400u) {
        bits = sign | ((rest << 13) + (112u << 23));
    } else {
        const float subnormal = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24, exact
        bits = sign | read<uint32_t>(&subnormal);
    }
    return read<float>(&bits);
}

LORA_INLINE void narrow(float value, float* out) { *out = value; }
LORA_INLINE void narrow(double value, double* out) { *out = value; }
LORA_INLINE void narrow(float value, bf16* out) {
    const uint32_t bits = read<uint32_t>(&value);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    out->bits = nan ? 0x7FC0u : static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
LORA_INLINE void narrow(float value, fp16* out) {
    uint32_t bits = read<uint32_t>(&value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7FFFFFFFu;
    uint32_t half;
    if (bits > 0x7F800000u) {
        half = 0x7E00u;
    } else if (bits >= 0x477FF000u) {  // 65520 and above round to infinity
        half = 0x7C00u;
    } else if (bits >= 0x38800000u) {  // normal
        half = (bits - (112u << 23) + 0x0FFFu + ((bits >> 13) & 1u)) >> 13;
    } else {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        float magic;
        __builtin_memcpy(&magic, &bits, sizeof magic);
        magic += 0.5f;
        half = read<uint32_t>(&magic) - 0x3F000000u;
    }
    out->bits = static_cast<uint16_t>(sign | half);
}

// 16 bits for each lane, widened with zeros.
LORA_INLINE WordVector widen_bits(const uint16_t* p) {
#if defined(__AVX512F__) && LORA_VECTOR_BYTES == 64
    return (WordVector)_mm512_maskz_cvtepu16_epi32(0xFFFF, read<__m256i>(p));
#elif defined(__AVX2__) && LORA_VECTOR_BYTES == 32
    return (WordVector)_mm256_cvtepu16_epi32(read<__m128i>(p));
#else
    return __builtin_convertvector(read<HalfWidthWords>(p), WordVector);
#endif
}

// 8 bits for each lane, widened with zeros.
LORA_INLINE WordVector widen_bytes(const uint8_t* p) {
#if defined(__AVX512F__) && LORA_VECTOR_BYTES == 64
    return (WordVector)_mm512_maskz_cvtepu8_epi32(0xFFFF, read<__m128i>(p));
#elif defined(__AVX2__) && LORA_VECTOR_BYTES == 32
    return (WordVector)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    WordVector words;
    for (int i = 0; i < lanes<float>; ++i) words[i] = p[i];
    return words;
#endif
}

// Vectors: load widens, store narrows.
LORA_INLINE FloatVector load(const float* p) { return read<FloatVector>(p); }
LORA_INLINE DoubleVector load(const double* p) { return read<DoubleVector>(p); }
LORA_INLINE FloatVector load(const bf16* p) {
    return (FloatVector)(widen_bits(reinterpret_cast<const uint16_t*>(p)) << 16);
}
LORA_INLINE FloatVector load(const fp16* p) {
    FloatVector v;
#if defined(__AVX512F__) && LORA_VECTOR_BYTES == 64
    v = (FloatVector)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    for (int i = 0; i < lanes<float>; i += 8) {
        const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
        __builtin_memcpy(reinterpret_cast<char*>(&v) + i * 4, &part, 32);
    }
#else
    for (int i = 0; i < lanes<float>; ++i) v[i] = widen(p[i]);
#endif
    return v;
}

LORA_INLINE void store(FloatVector v, float* p) { write(p, v); }
LORA_INLINE void store(DoubleVector v, double* p) { write(p, v); }
LORA_INLINE void store(FloatVector v, bf16* p) {
    const WordVector bits = (WordVector)v;
    const WordVector nan = (WordVector)((bits & 0x7FFFFFFFu) > 0x7F800000u);
    const WordVector rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    write(p, __builtin_convertvector((nan & 0x7FC0u) | (~nan & rounded), HalfWidthWords));
}
LORA_INLINE void store(FloatVector v, fp16* p) {
#if defined(__AVX512F__) && LORA_VECTOR_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    for (int i = 0; i < lanes<float>; i += 8) {
        __m256 part;
        __builtin_memcpy(&part, reinterpret_cast<const char*>(&v) + i * 4, 32);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
    }
#else
    for (int i = 0; i < lanes<float>; ++i) narrow(v[i], p + i);
#endif
}

// The first `count` lanes; the others are zero.
template <class E>
LORA_INLINE auto load_part(const E* p, int64_t count) {
    E padded[LORA_VECTOR_BYTES / sizeof(E)] = {};
    __builtin_memcpy(padded, p, static_cast<size_t>(count) * sizeof(E));
    return load(padded);
}

// As many as there are, when count may be beyond the lanes, or below 0.
template <class E>
LORA_INLINE auto load_some(const E* p, int64_t count) {
    constexpr int64_t all = sizeof(load(p)) / sizeof(load(p)[0]);
    return count >= all ? load(p) : load_part(p, count < 0 ? 0 : count);
}

template <class V>
LORA_INLINE auto sum_lanes(V v) {
    constexpr int count = sizeof(V) / sizeof(v[0]);
    auto values = v;
    for (int half = count / 2; half >= 1; half /= 2) {  // a tree of fixed order
        for (int i = 0; i < half; ++i) values[i] += values[i + half];
    }
    return values[0];
}

// The lanes of a and b by turns, {a0, b0, a1, b1, ...}: the lower HALF (0) of that, or the upper (1).
template <int HALF, class V, int... LANE>
LORA_INLINE V interleave(V a, V b, std::integer_sequence<int, LANE...>) {
    constexpr int COUNT = sizeof...(LANE);
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, (HALF * COUNT / 2 + LANE / 2 + LANE % 2 * COUNT)...);
#else  // GCC before 12
    typedef decltype(a < b) Index;
    return __builtin_shuffle(a, b, Index{(HALF * COUNT / 2 + LANE / 2 + LANE % 2 * COUNT)...});
#endif
}
template <int HALF, class V>
LORA_INLINE V interleave(V a, V b) {
    return interleave<HALF>(a, b, std::make_integer_sequence<int, static_cast<int>(sizeof(V) / sizeof(a[0]))>());
}

// Bit by bit, what two of the three are.
LORA_INLINE LongVector majority(LongVector a, LongVector b, LongVector c) {
#if defined(__AVX512F__) && LORA_VECTOR_BYTES == 64
    return (LongVector)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0xE8);
#else
    return a ^ ((a ^ b) & (a ^ c));
#endif
}

// The lanes of v whose bit of `word`, from bit `first` on, is set; the others are 0. `first` is a constant.
template <class V>
LORA_INLINE V kept_lanes(V v, uint32_t word, int first) {
#if defined(__AVX512F__) && LORA_VECTOR_BYTES == 64
    if constexpr (sizeof(v[0]) == 4) return (V)_mm512_maskz_mov_ps(static_cast<__mmask16>(word >> first), (__m512)v);
    return (V)_mm512_maskz_mov_pd(static_cast<__mmask8>(word >> first), (__m512d)v);
#else
    WordVector bits;
    for (int i = 0; i < lanes<float>; ++i) bits[i] = 1u << (first + i * 4 / static_cast<int>(sizeof(v[0])));
    return (V)((WordVector)(((WordVector{} + word) & bits) == bits) & (WordVector)v);
#endif
}

// Products of the low 32 bits of each 64-bit lane; what is above them is ignored.
LORA_INLINE LongVector multiply_low_words(LongVector a, LongVector b) {
#if defined(__AVX512F__) && LORA_VECTOR_BYTES == 64
    return (LongVector)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && LORA_VECTOR_BYTES == 32
    return (LongVector)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && LORA_VECTOR_BYTES == 16
    return (LongVector)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
