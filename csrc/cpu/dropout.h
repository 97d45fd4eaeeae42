// Dropout's keep bits for a run of columns, several Philox calls at once.
#pragma once

#include "../common.h"
#include "kernels.h"
#include "vector.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

constexpr int PHILOX_LANES = LORA_VECTOR_BYTES / 8;

// 16 random bits for each element of `groups` groups of a row from counter `index` on: out has 8 * round_up(groups,
// PHILOX_LANES) places. Lane i of each vector is one call; only the low words of the lanes count until the end.
LORA_INLINE void random_bits(const Dropout& dropout, uint64_t index, int64_t groups, uint16_t* out) {
    const LongVector multiplier0 = LongVector{} + PHILOX_MULTIPLIER_0, multiplier1 = LongVector{} + PHILOX_MULTIPLIER_1;
    const uint64_t low = 0xFFFFFFFFu;
    LongVector keys[PHILOX_ROUNDS][2], counter;
    uint32_t k0 = static_cast<uint32_t>(dropout.key), k1 = static_cast<uint32_t>(dropout.key >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round, k0 += PHILOX_WEYL_0, k1 += PHILOX_WEYL_1) {
        keys[round][0] = LongVector{} + static_cast<uint64_t>(k0);
        keys[round][1] = LongVector{} + static_cast<uint64_t>(k1);
    }
    const LongVector stream0 = LongVector{} + (dropout.stream & low), stream1 = LongVector{} + (dropout.stream >> 32);
    for (int i = 0; i < PHILOX_LANES; ++i) counter[i] = index + static_cast<uint64_t>(i);
    for (int64_t g = 0; g < groups; g += PHILOX_LANES, counter += static_cast<uint64_t>(PHILOX_LANES)) {
        LongVector c0 = counter, c1 = counter >> 32, c2 = stream0, c3 = stream1;
#pragma GCC unroll 7
        for (int round = 0; round < PHILOX_ROUNDS; ++round) {
            const LongVector product0 = multiply_low_words(c0, multiplier0);
            const LongVector product1 = multiply_low_words(c2, multiplier1);
            c0 = (product1 >> 32) ^ c1 ^ keys[round][0];
            c2 = (product0 >> 32) ^ c3 ^ keys[round][1];
            c1 = product1;
            c3 = product0;
        }
        const LongVector first = (c0 & low) | (c1 << 32), second = (c2 & low) | (c3 << 32);
        write(out + g * DROPOUT_GROUP, interleave<0>(first, second));
        write(out + g * DROPOUT_GROUP + LORA_VECTOR_BYTES / 2, interleave<1>(first, second));
    }
}

constexpr int64_t MASK_SPAN = 256;  // columns whose bits are drawn at once

// values[0 .. count) *= keep / (1 - p), for columns column .. column + count of a row of a (rows, columns) matrix;
// `column` is a multiple of DROPOUT_GROUP. As in torch's dropout, NaN times 0 is NaN.
template <class T>
LORA_INLINE void apply_dropout(const Dropout& dropout, int64_t row, int64_t column, int64_t columns, T* values,
                               int64_t count) {
    uint16_t bits[MASK_SPAN + DROPOUT_GROUP * PHILOX_LANES];
    const T scale = static_cast<T>(dropout.scale);
    for (int64_t done = 0; done < count; done += MASK_SPAN) {
        const int64_t span = count - done < MASK_SPAN ? count - done : MASK_SPAN;
        random_bits(dropout, dropout_group(row, column + done, columns), ceil_div(span, DROPOUT_GROUP), bits);
        T* out = values + done;
        int64_t i = 0;
        for (; i + lanes<T> <= span; i += lanes<T>) {
            typedef typename Types<T>::integers Integers;
            const Integers kept = widen_bits<T>(bits + i) >= static_cast<typename Types<T>::integer>(dropout.threshold);
            const Vector<T> factor = (Vector<T>)((Integers)(Vector<T>{} + scale) & kept);
            write(out + i, load(out + i) * factor);
        }
        for (; i < span; ++i) out[i] *= bits[i] >= dropout.threshold ? scale : T(0);
    }
}

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
