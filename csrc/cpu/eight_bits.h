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
        for (; at + VL <= stop; at += VL) {
            const WordVector bytes = widen_bytes(codes + at);
            store(E4M3 ? e4m3(bytes) * scale : (signed_bytes(bytes) - zero) * scale, to + (at - begin));
        }
        if (at == stop) continue;
        uint8_t rest[VL] = {};
        E values[VL];
        __builtin_memcpy(rest, codes + at, static_cast<size_t>(stop - at));
        const WordVector bytes = widen_bytes(rest);
        store(E4M3 ? e4m3(bytes) * scale : (signed_bytes(bytes) - zero) * scale, values);
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
