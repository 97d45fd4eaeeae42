// Dropout's mask for a block of a matrix: the words of several rows at once, and values times what they keep.
#pragma once

#include "../common.h"
#include "kernels.h"
#include "vector.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

constexpr int PHILOX_LANES = LORA_VECTOR_BYTES / 8;
constexpr int64_t MASK_WORDS = 128;  // that are drawn at once

// What all draws of a mask have in common, in each lane.
struct Philox {
    LongVector keys[PHILOX_ROUNDS][2], stream[2], digits[4 * PHILOX_CALLS];
    int first;

    explicit Philox(const Dropout& dropout) : first(first_call(dropout.keep)) {
        uint32_t k0 = static_cast<uint32_t>(dropout.key), k1 = static_cast<uint32_t>(dropout.key >> 32);
        for (int round = 0; round < PHILOX_ROUNDS; ++round, k0 += PHILOX_WEYL_0, k1 += PHILOX_WEYL_1) {
            keys[round][0] = LongVector{} + static_cast<uint64_t>(k0);
            keys[round][1] = LongVector{} + static_cast<uint64_t>(k1);
        }
        stream[0] = LongVector{} + (dropout.stream & 0xFFFFFFFFu);
        stream[1] = LongVector{} + (dropout.stream >> 32);
        for (int i = 0; i < 4 * PHILOX_CALLS; ++i)
            digits[i] = LongVector{} - static_cast<uint64_t>(dropout.keep >> i & 1);
    }
};

// The words of one row and one word number in each lane. Only a lane's low 32 bits count, here and on the way.
LORA_INLINE LongVector draw(const Philox& philox, LongVector row, LongVector word) {
    const LongVector multiplier0 = LongVector{} + PHILOX_MULTIPLIER_0;
    const LongVector multiplier1 = LongVector{} + PHILOX_MULTIPLIER_1;
    LongVector kept = {}, counter = word * PHILOX_CALLS + static_cast<uint64_t>(philox.first);
    for (int call = philox.first; call < PHILOX_CALLS; ++call, counter += 1) {
        LongVector c0 = counter, c1 = row, c2 = philox.stream[0], c3 = philox.stream[1];
#pragma GCC unroll 7
        for (int round = 0; round < PHILOX_ROUNDS; ++round) {
            const LongVector product0 = multiply_low_words(c0, multiplier0);
            const LongVector product1 = multiply_low_words(c2, multiplier1);
            c0 = (product1 >> 32) ^ c1 ^ philox.keys[round][0];
            c2 = (product0 >> 32) ^ c3 ^ philox.keys[round][1];
            c1 = product1;
            c3 = product0;
        }
        const LongVector* digits = philox.digits + 4 * call;
        kept = majority(kept, c0, digits[0]);
        kept = majority(kept, c1, digits[1]);
        kept = majority(kept, c2, digits[2]);
        kept = majority(kept, c3, digits[3]);
    }
    return kept;
}

// words[i * across + j], in the low 32 bits: of row + i and column + 32 j. There are places for a vector more. Lanes
// run on from row to row, so that narrow blocks fill them as well.
static void draw_words(const Dropout& dropout, int64_t row, int64_t column, int64_t rows, int64_t across,
                       uint64_t* words) {
    const int64_t count = rows * across;
    if (dropout.keep == KEEP_ALL) {
        for (int64_t i = 0; i < count; ++i) words[i] = ~uint64_t(0);
        return;
    }
    const Philox philox(dropout);
    LongVector place = {}, line = {};
    uint64_t next = 0, down = 0;
    for (int lane = 0; lane < PHILOX_LANES; ++lane) {
        place[lane] = next;
        line[lane] = static_cast<uint64_t>(dropout.row + row) + down;
        if (++next == static_cast<uint64_t>(across)) next = 0, ++down;
    }
    const uint64_t first = static_cast<uint64_t>(column / DROPOUT_WORD);
    for (int64_t i = 0; i < count; i += PHILOX_LANES) {
        write(words + i, draw(philox, line, place + first));
        place += next;
        const LongVector beyond = (LongVector)((SignedLongs)place >= static_cast<int64_t>(across));
        place -= beyond & static_cast<uint64_t>(across);
        line += down - beyond;
    }
}

// body(i, j, count, words) for each row i of a block (rows, columns) and columns j to j + count of it, with the words
// of those columns. The block begins at (row, column) of the matrix, column a multiple of DROPOUT_WORD.
template <class F>
LORA_INLINE void with_mask(const Dropout& dropout, int64_t row, int64_t column, int64_t rows, int64_t columns,
                           const F& body) {
    uint64_t words[MASK_WORDS + PHILOX_LANES];
    for (int64_t j = 0; j < columns; j += MASK_WORDS * DROPOUT_WORD) {
        const int64_t rest = columns - j, count = rest < MASK_WORDS * DROPOUT_WORD ? rest : MASK_WORDS * DROPOUT_WORD;
        const int64_t across = ceil_div(count, DROPOUT_WORD), most = MASK_WORDS / across;
        for (int64_t i = 0; i < rows; i += most) {
            const int64_t height = rows - i < most ? rows - i : most;
            draw_words(dropout, row + i, column + j, height, across, words);
            for (int64_t q = 0; q < height; ++q) body(i + q, j, count, words + q * across);
        }
    }
}

// out (rows, columns), row distance ldo = source (row distance lds, may be out) * keep / (1 - p), widened. (row,
// column) is its place in the matrix, as with_mask has it. As in torch's dropout, NaN times 0 is NaN.
template <class T, class E>
static void drop_block(const E* source, int64_t lds, int64_t rows, int64_t columns, T* out, int64_t ldo,
                       const Dropout& dropout, int64_t row, int64_t column) {
    constexpr int VL = lanes<T>;
    const T scale = static_cast<T>(dropout.scale);
    with_mask(dropout, row, column, rows, columns, [&](int64_t i, int64_t j, int64_t count, const uint64_t* words) {
        const E* from = source + i * lds + j;
        T* to = out + i * ldo + j;
        for (; count >= DROPOUT_WORD; count -= DROPOUT_WORD, from += DROPOUT_WORD, to += DROPOUT_WORD, ++words) {
            const uint32_t word = static_cast<uint32_t>(*words);
#pragma GCC unroll 16
            for (int at = 0; at < DROPOUT_WORD; at += VL)
                store(load(from + at) * kept_lanes(Vector<T>{} + scale, word, at), to + at);
        }
        for (int64_t at = 0; at < count; ++at) to[at] = widen(from[at]) * (*words >> at & 1 ? scale : T(0));
    });
}

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
