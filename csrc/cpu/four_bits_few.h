// The product of few tokens with a weight of 4-bit codes, which reads the codes themselves.
#pragma once

#include "four_bits.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

// out = gain * (x Wᵀ + low lora_bᵀ) + bias for few tokens. A row of W is cut into segments of one absmax each. Codes
// come two a byte: in each piece of columns that a step takes, x is put in the order in which values are found, the
// high half of each byte as an even column, so that they need no sorting.
template <class E>
struct FewFourBits {
    using Lookup = CodeLookup<E>;
    static constexpr int VL = lanes<float>, VECTORS = Lookup::VECTORS, STEP = Lookup::COLUMNS;
    static constexpr int64_t PAIRS_STEP = 64;
    static constexpr int64_t DIRECT = 4;  // tokens for which values are used as they are made; for more they are stored

    FourBits w;
    FewForward<float, E, E> output;  // its x is arranged; its weight is not read
    int64_t segment, segments;       // columns of one, and how many there are in a row
    bool pairs;

    static int64_t segment_of(const FourBits& w) {
        int64_t a = w.k, b = w.blocksize;
        while (b != 0) {
            const int64_t rest = a % b;
            a = b, b = rest;
        }
        return a;
    }
    static bool takes_pairs(int64_t segment) { return LORA_HALF_LOOKUP && in_pairs<E> && segment % PAIRS_STEP == 0; }

    // x (m, k), arranged: as it is stored for pairs, else widened.
    static void arrange_pairs(const E* x, int64_t ldx, int64_t m, int64_t k, bool low_first, E* out) {
        const int even = low_first ? 16 : 0;  // where a pair has what the code in the high half is multiplied with
        constexpr int HALF = PAIRS_STEP / 2;
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t at = 0; at < k; at += PAIRS_STEP) {
                uint32_t words[HALF];
                uint16_t arranged[PAIRS_STEP];
                __builtin_memcpy(words, x + i * ldx + at, sizeof words);
                for (int q = 0; q < HALF; ++q) arranged[q] = static_cast<uint16_t>(words[q] >> even);
                for (int q = 0; q < HALF; ++q) arranged[HALF + q] = static_cast<uint16_t>(words[q] >> (16 - even));
                __builtin_memcpy(out + i * k + at, arranged, sizeof arranged);
            }
        }
    }
    static void arrange(const E* x, int64_t ldx, int64_t m, int64_t k, bool low_first, float* out) {
        const int other = low_first ? 1 : 0;  // the columns of two codes in a byte are each other's place
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t at = 0; at < k; at += STEP) {
                float wide[STEP];
                for (int q = 0; q < STEP; q += VL) store(load(x + i * ldx + at + q), wide + q);
                for (int q = 0; q < STEP; ++q) out[i * k + at + q] = wide[Lookup::column(q) ^ other];
            }
        }
    }

    const uint8_t* codes_of(int64_t row) const { return w.codes + row * w.k / 2; }

    // The absmax of each segment of a row; `scales` is room for them.
    const float* scales_of(int64_t row, float* scales) const {
        const int64_t start = row * w.k, first = start / w.blocksize;
        if (segment == w.blocksize) return statistics(w, first, segments, scales);
        for (int64_t s = 0; s < segments; ++s)
            scales[s] = *statistics(w, (start + s * segment) / w.blocksize, 1, scales + s);
        return scales;
    }

    // A sum is made in so many chains: a multiply-add waits for the one before it in its own chain only.
    static constexpr int chains_of(int tokens) { return tokens == 1 ? VECTORS : tokens == 2 ? 2 : 1; }

    template <int MR, int CHAINS>
    __attribute__((always_inline)) void add_segment(int64_t i, const uint8_t* codes, int64_t begin,
                                                    const Lookup& values, FloatVector (&sums)[MR][CHAINS]) const {
        const float* x = output.x + i * w.k + begin;
        for (int64_t at = 0; at < segment; at += STEP, x += STEP) {
            FloatVector found[VECTORS];
            values.step(codes + at / 2, found);
#pragma GCC unroll 4
            for (int token = 0; token < MR; ++token) {
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) sums[token][v % CHAINS] += load(x + token * w.k + v * VL) * found[v];
            }
        }
    }

    template <int MR, int NR>
    void multiply_rows(int64_t i, int64_t j, const float* const* scales, FloatVector (&sums)[MR][NR]) const {
        constexpr int CHAINS = chains_of(MR);
        FloatVector chains[NR][MR][CHAINS] = {};
        const uint8_t* codes[NR];
        for (int row = 0; row < NR; ++row) codes[row] = codes_of(j + row);
        for (int64_t s = 0; s < segments; ++s) {
#pragma GCC unroll 4
            for (int row = 0; row < NR; ++row) {
                const Lookup values(w.table, scales[row][s]);
                add_segment(i, codes[row] + s * segment / 2, s * segment, values, chains[row]);
            }
        }
        for (int row = 0; row < NR; ++row) {
            for (int token = 0; token < MR; ++token) {
                sums[token][row] = chains[row][token][0];
                for (int chain = 1; chain < CHAINS; ++chain) sums[token][row] += chains[row][token][chain];
            }
        }
    }
#if LORA_HALF_LOOKUP && LORA_PAIRS
    const bf16* arranged() const { return reinterpret_cast<const bf16*>(output.x); }  // in pairs
    PairedForward in_pairs_output() const {
        const FewForward<float, E, E>& o = output;
        return {o.m, o.n, o.k, o.r, arranged(), w.k, nullptr, 0, o.low, o.lora_b, o.bias, o.gain, o.linear, o.out};
    }
    template <int MR, int NR>
    void add_pairs_of(int64_t i, int64_t j, const float* const* scales, FloatVector (&sums)[MR][NR]) const {
        const uint8_t* codes[NR];
        const float* absmax[NR];
        for (int row = 0; row < NR; ++row) codes[row] = codes_of(j + row), absmax[row] = scales[row];
        const bf16* x = arranged() + i * w.k;
        const size_t step = PAIRS_STEP / 2, bytes_of_segment = static_cast<size_t>(segment) / 2;
        for (size_t at = 0, s = 0, end = static_cast<size_t>(w.k) / 2; at < end; ++s) {
            __m512i values[NR];
#pragma GCC unroll 4
            for (int row = 0; row < NR; ++row) values[row] = half_values<E>(w.table, absmax[row][s]);
            for (const size_t next = at + bytes_of_segment; at < next; at += step) {
#pragma GCC unroll 4
                for (int row = 0; row < NR; ++row) {
                    const __m512i bytes = widen_codes(codes[row] + at);
                    const __m512i even = look_up(values[row], next_codes(bytes)), odd = look_up(values[row], bytes);
#pragma GCC unroll 4
                    for (int token = 0; token < MR; ++token) {
                        const bf16* of = x + token * w.k + 2 * at;
                        sums[token][row] = add_pairs(sums[token][row], read_pairs(of), (FloatVector)even);
                        sums[token][row] = add_pairs(sums[token][row], read_pairs(of + step), (FloatVector)odd);
                    }
                }
            }
        }
    }
#endif

    template <int MR, int NR>
    void direct(int64_t i, int64_t j, const float* const* scales) const {
#if LORA_HALF_LOOKUP && LORA_PAIRS
        if constexpr (in_pairs<E>) {
            if (pairs) {
                FloatVector sums[MR][NR] = {};
                add_pairs_of<MR, NR>(i, j, scales, sums);
                return in_pairs_output().template block<MR, NR>(i, j, &sums[0][0]);
            }
        }
#endif
        constexpr int TOGETHER = LORA_VECTOR_BYTES == 64 ? NR : 1;  // by the registers
        for (int row = 0; row < NR; row += TOGETHER) {
            FloatVector sums[MR][TOGETHER];
            multiply_rows<MR, TOGETHER>(i, j + row, scales + row, sums);
            output.finish(i, j + row, sums);
        }
    }

    // A row's values, arranged as x is: E (k) for pairs, else widened.
    void values_of(int64_t row, const float* scales, float* out) const {
        const uint8_t* codes = codes_of(row);
        for (int64_t s = 0; s < segments; ++s) {
            const int64_t begin = s * segment, end = begin + segment;
#if LORA_HALF_LOOKUP && LORA_PAIRS
            if constexpr (in_pairs<E>) {
                if (pairs) {
                    const __m512i values = half_values<E>(w.table, scales[s]);
                    E* to = reinterpret_cast<E*>(out);
                    for (int64_t at = begin; at < end; at += PAIRS_STEP, codes += PAIRS_STEP / 2) {
                        const __m512i bytes = widen_codes(codes);
                        write(to + at, look_up(values, next_codes(bytes)));
                        write(to + at + PAIRS_STEP / 2, look_up(values, bytes));
                    }
                    continue;
                }
            }
#endif
            const Lookup values(w.table, scales[s]);
            for (int64_t at = begin; at < end; at += STEP, codes += STEP / 2) {
                FloatVector found[VECTORS];
                values.step(codes, found);
                for (int v = 0; v < VECTORS; ++v) store(found[v], out + at + v * VL);
            }
        }
    }

    // All tokens by rows that are stored: more at a time than of a weight in memory, for these are near.
    template <int NR, class W>
    void tokens(int64_t j, const W* rows) const {
        constexpr int WIDE = LORA_VECTOR_BYTES == 64 ? 6 : 3;
        int64_t i = 0;
        for (; i + WIDE <= output.m; i += WIDE) output.template block<WIDE, NR>(i, j, rows, w.k);
        for (; i + 3 <= output.m && output.m - i != 4; i += 3) output.template block<3, NR>(i, j, rows, w.k);
        for (; i + 2 <= output.m; i += 2) output.template block<2, NR>(i, j, rows, w.k);
        if (i < output.m) output.template block<1, NR>(i, j, rows, w.k);
    }

    template <int NR>
    void columns(int64_t j, float* scratch) const {
        const float* scales[NR];
        float* rows = scratch + CODE_ROWS * segments;
        for (int row = 0; row < NR; ++row) scales[row] = scales_of(j + row, scratch + row * segments);
        if (output.m == 1) return direct<1, NR>(0, j, scales);
        if (output.m == 2) return direct<2, NR>(0, j, scales);
        if (output.m == 3) return direct<3, NR>(0, j, scales);
        if (output.m == DIRECT) return direct<4, NR>(0, j, scales);
#if LORA_HALF_LOOKUP && LORA_PAIRS
        if constexpr (in_pairs<E>) {
            if (pairs) {
                E* halves = reinterpret_cast<E*>(rows);
                for (int row = 0; row < NR; ++row)
                    values_of(j + row, scales[row], reinterpret_cast<float*>(halves + row * w.k));
                return multiply_pairs<NR>(output.m, j, w.k, arranged(), w.k, halves, w.k, in_pairs_output());
            }
        }
#endif
        for (int row = 0; row < NR; ++row) values_of(j + row, scales[row], rows + row * w.k);
        tokens<NR>(j, rows);
    }

    // A block of the order by columns, as 32 rows in the usual one; `room` is `by_rows_room` floats.
    FewFourBits by_rows(int64_t first, float* room) const {
        FewFourBits block = *this;
        const int64_t count = BLOCK_ROWS * w.k / w.blocksize;
        uint8_t* codes = reinterpret_cast<uint8_t*>(room + count);
        codes_by_rows(w.codes + first * w.k / 2, w.k / 2, codes);
        block.w.absmax = statistics(w, first * w.k / w.blocksize, count, room);
        block.w.n = BLOCK_ROWS, block.w.codes = codes, block.w.by_columns = nullptr;
        block.output = output.from_column(first);
        return block;
    }
    int64_t by_rows_room() const {
        return w.by_columns == nullptr ? 0 : BLOCK_ROWS * (w.k / w.blocksize + round_up(w.k, 128) / 8);
    }

    void rows(const Range& range, float* scratch) const {
        int64_t j = range.begin;
        for (; j + CODE_ROWS <= range.end; j += CODE_ROWS) columns<CODE_ROWS>(j, scratch);
        for (; j < range.end; ++j) columns<1>(j, scratch);
    }

    int64_t scratch_per_task() const {
        return by_rows_room() + round_up(CODE_ROWS * (segments + (output.m <= DIRECT ? 0 : w.k)), 16);
    }
    void run(int64_t threads, float* scratch) const {
        const int64_t unit = w.by_columns == nullptr ? CODE_ROWS : BLOCK_ROWS;
        const int64_t tasks = least(threads, ceil_div(w.n, unit));
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(w.n, unit, tasks, task);
            float* own = scratch + task * scratch_per_task();
            if (w.by_columns == nullptr) return rows(range, own);
            for (int64_t j = range.begin; j < range.end; j += BLOCK_ROWS)
                by_rows(j, own).rows({0, BLOCK_ROWS}, own + by_rows_room());
        });
    }
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
