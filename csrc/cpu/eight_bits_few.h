// The product of very few tokens with a weight of 8-bit codes: values are used as they are made.
#pragma once

#include "eight_bits.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

// v rounded to E, and widened again. A NaN must be the default one, to which no rounding carries.
template <class E>
LORA_INLINE FloatVector rounded_to(FloatVector v) {
    if constexpr (sizeof(E) == 4) {
        return v;
    } else if constexpr (__is_same(E, bf16)) {
        const WordVector bits = (WordVector)v;
        return (FloatVector)((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
    } else {
        E halves[lanes<float>];
        store(v, halves);
        return load(halves);
    }
}

// out = gain * (x Wᵀ + low lora_bᵀ) + bias for up to DIRECT tokens, a row of W after the other.
template <class E>
struct FewEightBits {
    static constexpr int VL = lanes<float>, STEP = 2 * VL;
    static constexpr int64_t DIRECT = 4;

    EightBits w;
    FewForward<float, E, E> output;  // its x is widened; its weight is not read

    // A sum is made in so many chains: a multiply-add waits for the one before it in its own chain only.
    static constexpr int chains_of(int tokens) { return tokens == 1 ? 4 : 2; }

    // Two vectors, into the chains from FIRST on.
    template <bool E4M3, int MR, int CHAINS, int FIRST>
    __attribute__((always_inline)) void add_step(const uint8_t* codes, const float* x, float scale, float zero,
                                                 FloatVector (&sums)[MR][CHAINS]) const {
        FloatVector found[2];
        scaled_codes<E4M3>(codes, scale, zero, found);
        found[0] = rounded_to<E>(found[0]), found[1] = rounded_to<E>(found[1]);
#pragma GCC unroll 4
        for (int token = 0; token < MR; ++token) {
            sums[token][FIRST] += load(x + token * w.k) * found[0];
            sums[token][FIRST + 1] += load(x + token * w.k + VL) * found[1];
        }
    }

    template <bool E4M3, int MR, int CHAINS>
    __attribute__((always_inline)) void add_block(const uint8_t* codes, const float* x, int64_t count, float scale,
                                                  float zero, FloatVector (&sums)[MR][CHAINS]) const {
        int64_t at = 0;
        for (; at + 2 * STEP <= count; at += 2 * STEP) {
            add_step<E4M3, MR, CHAINS, 0>(codes + at, x + at, scale, zero, sums);
            add_step<E4M3, MR, CHAINS, CHAINS - 2>(codes + at + STEP, x + at + STEP, scale, zero, sums);
        }
        if (at + STEP <= count) add_step<E4M3, MR, CHAINS, 0>(codes + at, x + at, scale, zero, sums), at += STEP;
        for (; at < count; at += VL) {
            const int64_t left = least(VL, count - at);
            uint8_t rest[VL] = {};
            __builtin_memcpy(rest, codes + at, static_cast<size_t>(left));
            const FloatVector found = rounded_to<E>(scaled_bytes<E4M3>(widen_bytes(rest), scale, zero));
            for (int token = 0; token < MR; ++token) {
                const float* own = x + token * w.k + at;
                sums[token][0] += left == VL ? load(own) * found : load_part(own, left) * first_lanes(found, left);
            }
        }
    }

    template <bool E4M3, int MR>
    void row(int64_t j) const {
        constexpr int CHAINS = chains_of(MR);
        FloatVector chains[MR][CHAINS] = {};
        const int64_t grid = j / w.high * ceil_div(w.k, w.wide);
        for (int64_t begin = 0, block = grid; begin < w.k; begin += w.wide, ++block) {
            const float zero = w.zeros == nullptr ? 0.0f : w.zeros[block], given = w.scales[block];
            const float scale = given == given ? given : __builtin_nanf("");
            add_block<E4M3>(w.codes + j * w.k + begin, output.x + begin, least(w.wide, w.k - begin), scale, zero,
                            chains);
        }
        FloatVector sums[MR][1];
        for (int token = 0; token < MR; ++token) {
            sums[token][0] = chains[token][0];
            for (int chain = 1; chain < CHAINS; ++chain) sums[token][0] += chains[token][chain];
        }
        output.finish(0, j, sums);
    }

    template <bool E4M3>
    void rows(const Range& range) const {
        for (int64_t j = range.begin; j < range.end; ++j) {
            if (output.m == 1) row<E4M3, 1>(j);
            if (output.m == 2) row<E4M3, 2>(j);
            if (output.m == 3) row<E4M3, 3>(j);
            if (output.m == DIRECT) row<E4M3, DIRECT>(j);
        }
    }

    void run(int64_t threads) const {
        const int64_t tasks = least(threads, w.n);
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(w.n, 1, tasks, task);
            w.e4m3 ? rows<true>(range) : rows<false>(range);
        });
    }
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
