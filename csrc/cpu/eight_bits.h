// A weight of 8-bit codes, int8 or e4m3: a row's values, rounded to E once.
#pragma once

#include "few.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

// int8 numbers of all lanes' low bytes.
LORA_INLINE FloatVector signed_bytes(WordVector bytes) {
    return __builtin_convertvector((SignedWords)(bytes << 24) >> 24, FloatVector);
}

// e4m3 numbers: 4 bits of exponent, 3 of mantissa. Below the least normal number an implicit one is added, and taken
// off again; all ones are NaN.
LORA_INLINE FloatVector e4m3(WordVector bytes) {
    constexpr uint32_t EXPONENT = (127 - 7) << 23, LEAST = EXPONENT + (1 << 23);
    const WordVector magnitude = bytes & 0x7Fu, shifted = magnitude << 20;
    const WordVector tiny = (WordVector)(magnitude < 8u), nan = (WordVector)(magnitude == 0x7Fu);
    const FloatVector least_normal = (FloatVector)(WordVector{} + LEAST);
    const WordVector small = (WordVector)((FloatVector)(shifted + LEAST) - least_normal);
    const WordVector found = (tiny & small) | (~tiny & (shifted + EXPONENT)) | (nan & 0x7FC00000u);
    return (FloatVector)(found | ((bytes & 0x80u) << 24));
}

template <bool E4M3>
LORA_INLINE FloatVector scaled_bytes(WordVector bytes, float scale, float zero) {
    return E4M3 ? e4m3(bytes) * scale : (signed_bytes(bytes) - zero) * scale;
}

#if defined(__AVX2__) && defined(__F16C__) && LORA_VECTOR_BYTES == 32
// 16 e4m3 numbers: a byte moved into fp16's exponent and mantissa is the number divided by 256, exactly.
LORA_INLINE void e4m3_numbers(const uint8_t* codes, FloatVector& low, FloatVector& high) {
    const __m256i bytes = _mm256_cvtepu8_epi16(read<__m128i>(codes));
    const __m256i magnitude = _mm256_and_si256(bytes, _mm256_set1_epi16(0x7F));
    const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7F));
    const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(bytes, magnitude), 8);
    const __m256i number = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign);
    const __m256i half = _mm256_or_si256(number, _mm256_and_si256(nan, _mm256_set1_epi16(0x7E00)));
    low = (FloatVector)_mm256_cvtph_ps(_mm256_castsi256_si128(half)) * 256.0f;
    high = (FloatVector)_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)) * 256.0f;
}
LORA_INLINE FloatVector int8_numbers(const uint8_t* codes) {
    return (FloatVector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)codes)));
}
#endif

// The values of two vectors of codes.
template <bool E4M3>
LORA_INLINE void scaled_codes(const uint8_t* codes, float scale, float zero, FloatVector (&out)[2]) {
    constexpr int VL = lanes<float>;
#if defined(__AVX2__) && defined(__F16C__) && LORA_VECTOR_BYTES == 32
    if constexpr (E4M3) {
        e4m3_numbers(codes, out[0], out[1]);
        out[0] = out[0] * scale, out[1] = out[1] * scale;
    } else {
        out[0] = (int8_numbers(codes) - zero) * scale, out[1] = (int8_numbers(codes + VL) - zero) * scale;
    }
#else
    out[0] = scaled_bytes<E4M3>(widen_bytes(codes), scale, zero);
    out[1] = scaled_bytes<E4M3>(widen_bytes(codes + VL), scale, zero);
#endif
}

// The first `count` lanes of v; the others are zero.
LORA_INLINE FloatVector first_lanes(FloatVector v, int64_t count) {
    float values[lanes<float>];
    store(v, values);
    return load_part(values, count);
}

// The values of 32 codes as bf16, where no product with `scale` is below the least normal number.
#if LORA_VECTOR_BYTES == 64 && defined(__AVX512BF16__) && defined(__AVX512BW__)
constexpr int64_t NEAR = 32;
constexpr float LEAST_SCALE = 1e-30f;
// A byte moved into fp16's exponent and mantissa is the number divided by 256, exactly.
LORA_INLINE void store_scaled_e4m3(const uint8_t* codes, float scale, bf16* to) {
    const __m512i bytes = _mm512_maskz_cvtepu8_epi16(~0u, read<__m256i>(codes));
    const __m512i magnitude = _mm512_maskz_and_epi32(0xFFFF, bytes, _mm512_set1_epi16(0x7F));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7F));
    const __m512i sign =
        _mm512_maskz_slli_epi16(~0u, _mm512_maskz_and_epi32(0xFFFF, bytes, _mm512_set1_epi16(0x80)), 8);
    const __m512i number = _mm512_mask_set1_epi16(_mm512_maskz_slli_epi16(~0u, magnitude, 7), nan, 0x7E00);
    const __m512i half = _mm512_maskz_or_epi32(0xFFFF, number, sign);
    const __m512 factor = _mm512_set1_ps(scale * 256.0f);
    const __m512 low = _mm512_maskz_cvtph_ps(0xFFFF, _mm512_castsi512_si256(half));
    const __m512 high = _mm512_maskz_cvtph_ps(0xFFFF, _mm512_maskz_extracti64x4_epi64(0xF, half, 1));
    write(to, _mm512_cvtne2ps_pbh(high * factor, low * factor));
}
LORA_INLINE void store_scaled_int8(const uint8_t* codes, float scale, float zero, bf16* to) {
    const FloatVector low = scaled_bytes<false>(widen_bytes(codes), scale, zero),
                      high = scaled_bytes<false>(widen_bytes(codes + 16), scale, zero);
    write(to, _mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
LORA_INLINE bool is_near(float scale) {
    const float size = scale < 0 ? -scale : scale;
    return size >= LEAST_SCALE && size <= 1e30f;
}
#endif

// Columns begin .. end of a row.
template <bool E4M3, class E>
LORA_INLINE void eight_bit_row(const EightBits& w, int64_t row, int64_t begin, int64_t end, E* to) {
    constexpr int VL = lanes<float>;
    const uint8_t* codes = w.codes + row * w.k;
    const int64_t grid = row / w.high * ceil_div(w.k, w.wide);
    int64_t block = begin / w.wide;
    for (int64_t at = begin; at < end; ++block) {
        const int64_t stop = least(end, (block + 1) * w.wide);
        const float scale = w.scales[grid + block], zero = w.zeros == nullptr ? 0.0f : w.zeros[grid + block];
#if LORA_VECTOR_BYTES == 64 && defined(__AVX512BF16__) && defined(__AVX512BW__)
        if constexpr (__is_same(E, bf16)) {
            for (const bool near = is_near(scale); near && at + NEAR <= stop; at += NEAR) {
                E* out = to + (at - begin);
                E4M3 ? store_scaled_e4m3(codes + at, scale, out) : store_scaled_int8(codes + at, scale, zero, out);
            }
        }
#endif
        for (; at + 2 * VL <= stop; at += 2 * VL) {
            FloatVector found[2];
            scaled_codes<E4M3>(codes + at, scale, zero, found);
            store(found[0], to + (at - begin));
            store(found[1], to + (at - begin) + VL);
        }
        for (; at + VL <= stop; at += VL)
            store(scaled_bytes<E4M3>(widen_bytes(codes + at), scale, zero), to + (at - begin));
        if (at == stop) continue;
        uint8_t rest[VL] = {};
        E values[VL];
        __builtin_memcpy(rest, codes + at, static_cast<size_t>(stop - at));
        store(scaled_bytes<E4M3>(widen_bytes(rest), scale, zero), values);
        __builtin_memcpy(to + (at - begin), values, static_cast<size_t>(stop - at) * sizeof(E));
        at = stop;
    }
}

template <class E>
LORA_INLINE void eight_bit_values(const EightBits& w, int64_t row, int64_t begin, int64_t end, E* to) {
    return w.e4m3 ? eight_bit_row<true>(w, row, begin, end, to) : eight_bit_row<false>(w, row, begin, end, to);
}

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
