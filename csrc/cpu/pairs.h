// bf16 multiplied in pairs, as AVX512-BF16 does it: both sides are read as they are stored, and a vector adds up two
// products in each lane. It is twice the rate of widened vectors, so y of few tokens, h and dh are made so.
//
// A product is made of rows along the depth, left (m, k) and right (n, k): blocks of a few rows of each have their sums
// in registers, one vector for each pair of rows, and sixteen of them are added up across the lanes at once.
#pragma once

#include "products.h"

// Where the machine has the instruction. LORA_PAIRS=1 takes this way on any machine, with the instruction written out:
// for tests.
#ifndef LORA_PAIRS
#if defined(__AVX512BF16__)
#define LORA_PAIRS 1
#else
#define LORA_PAIRS 0
#endif
#endif

namespace lora_kernels {
namespace LORA_CAPABILITY {

template <class E>
constexpr bool in_pairs = LORA_PAIRS && __is_same(E, bf16);

// DROPOUT_WORD values: where the bit of `word` is 0, finite ones become 0, and NaN and infinities NaN, as 0 times them
// is.
LORA_INLINE void copy_kept(const bf16* from, uint32_t word, bf16* to) {
#if defined(__AVX512BW__) && LORA_VECTOR_BYTES == 64
    const __m512i values = read<__m512i>(from), exponent = _mm512_set1_epi16(0x7F80);
    const __mmask32 endless = _mm512_cmpeq_epi16_mask(_mm512_and_si512(values, exponent), exponent);
    write(to, _mm512_mask_mov_epi16(_mm512_maskz_set1_epi16(endless, 0x7FC0), word, values));
#else
    for (int i = 0; i < DROPOUT_WORD; ++i) {
        const uint16_t value = from[i].bits, dropped = (value & 0x7F80u) == 0x7F80u ? 0x7FC0u : 0u;
        to[i].bits = word >> i & 1 ? value : dropped;
    }
#endif
}

// out (rows, columns), row distance ldo: source's block, 0 where it is dropped; 1 / (1 - p) is left to the sums.
[[maybe_unused]] static void copy_kept(const bf16* source, int64_t lds, int64_t rows, int64_t columns, bf16* out,
                                       int64_t ldo, const Dropout& dropout, int64_t row, int64_t column) {
    with_mask(dropout, row, column, rows, columns, [&](int64_t i, int64_t j, int64_t count, const uint64_t* words) {
        const bf16* from = source + i * lds + j;
        bf16* to = out + i * ldo + j;
        for (; count >= DROPOUT_WORD; count -= DROPOUT_WORD, from += DROPOUT_WORD, to += DROPOUT_WORD, ++words)
            copy_kept(from, static_cast<uint32_t>(*words), to);
        if (count == 0) return;
        bf16 rest[DROPOUT_WORD] = {};
        __builtin_memcpy(rest, from, static_cast<size_t>(count) * sizeof(bf16));
        copy_kept(rest, static_cast<uint32_t>(*words), rest);
        __builtin_memcpy(to, rest, static_cast<size_t>(count) * sizeof(bf16));
    });
}

#if LORA_PAIRS
static_assert(LORA_VECTOR_BYTES == 64, "pairs are multiplied in vectors of 64 bytes");

constexpr int PAIRED = 2 * lanes<float>;  // bf16 in a vector
constexpr int SQUARE = lanes<float>;      // sums that are added up across the lanes at once
constexpr int64_t PAIRED_DEPTH = 2048;    // of a block: its rows stay in the first-level cache
constexpr int64_t PAIRED_TOKENS = 16;     // rows of left that share one read of right from the first-level cache

LORA_INLINE FloatVector read_pairs(const bf16* p) { return read<FloatVector>(p); }
LORA_INLINE FloatVector read_pairs(const bf16* p, int64_t count) {  // zeros beyond count
    bf16 padded[PAIRED] = {};
    __builtin_memcpy(padded, p, static_cast<size_t>(count) * sizeof(bf16));
    return read<FloatVector>(padded);
}

// sum + the products of the even elements + those of the odd ones.
LORA_INLINE FloatVector add_pairs(FloatVector sum, FloatVector a, FloatVector b) {
#if defined(__AVX512BF16__)
    return (FloatVector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const WordVector left = (WordVector)a, right = (WordVector)b;
    sum += (FloatVector)(left & 0xFFFF0000u) * (FloatVector)(right & 0xFFFF0000u);
    return sum + (FloatVector)(left << 16) * (FloatVector)(right << 16);
#endif
}

// The sums of each of SQUARE vectors' lanes, in their order.
LORA_INLINE FloatVector sum_each(FloatVector (&rows)[SQUARE]) {
#pragma GCC unroll 4
    for (int half = SQUARE / 2; half >= 1; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i)
            rows[i] = interleave<0>(rows[i], rows[i + half]) + interleave<1>(rows[i], rows[i + half]);
    }
    return rows[0];
}

// sums[i * NR + j] += left_i · right_j.
template <int MR, int NR>
LORA_INLINE void dot_pairs(int64_t depth, const bf16* left, int64_t ldl, const bf16* right, int64_t ldr,
                           FloatVector* sums) {
    FloatVector acc[MR][NR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < NR; ++j) acc[i][j] = sums[i * NR + j];
    }
    int64_t at = 0;
    for (; at + PAIRED <= depth; at += PAIRED) {
        FloatVector b[NR];
#pragma GCC unroll 8
        for (int j = 0; j < NR; ++j) b[j] = read_pairs(right + j * ldr + at);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
            const FloatVector a = read_pairs(left + i * ldl + at);
#pragma GCC unroll 8
            for (int j = 0; j < NR; ++j) acc[i][j] = add_pairs(acc[i][j], a, b[j]);
        }
    }
    if (at < depth) {
        for (int i = 0; i < MR; ++i) {
            for (int j = 0; j < NR; ++j)
                acc[i][j] = add_pairs(acc[i][j], read_pairs(left + i * ldl + at, depth - at),
                                      read_pairs(right + j * ldr + at, depth - at));
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < NR; ++j) sums[i * NR + j] = acc[i][j];
    }
}

// body(height, i) for blocks of rows i .. i + height, as even as they get; height, 1 to 4, is known when it compiles.
template <class F>
LORA_INLINE void each_block(int64_t rows, const F& body) {
    for (int64_t i = 0; i < rows;) {
        const int64_t rest = rows - i, height = ceil_div(rest, ceil_div(rest, 4));
        if (height == 1) body(std::integral_constant<int, 1>{}, i);
        if (height == 2) body(std::integral_constant<int, 2>{}, i);
        if (height == 3) body(std::integral_constant<int, 3>{}, i);
        if (height == 4) body(std::integral_constant<int, 4>{}, i);
        i += height;
    }
}

// left (m, depth) against NR rows, of right from j on, read once; finish.block<MR, NR>(i, j, sums) takes the vectors.
template <int NR, class Finish>
static void multiply_pairs(int64_t m, int64_t j, int64_t depth, const bf16* left, int64_t ldl, const bf16* rows,
                           int64_t ldr, const Finish& finish) {
    constexpr int64_t MOST = NR > 4 ? SQUARE / NR : PAIRED_TOKENS;
    for (int64_t first = 0; first < m; first += MOST) {
        const int64_t tokens = least(MOST, m - first);
        FloatVector sums[MOST * NR];
        for (int64_t i = 0; i < tokens * NR; ++i) sums[i] = FloatVector{};
        for (int64_t k0 = 0; k0 < depth; k0 += PAIRED_DEPTH) {
            each_block(tokens, [&](auto height, int64_t i) {
                constexpr int MR = least_int(decltype(height)::value, SQUARE / NR);
                dot_pairs<MR, NR>(least(PAIRED_DEPTH, depth - k0), left + (first + i) * ldl + k0, ldl, rows + k0, ldr,
                                  sums + i * NR);
            });
        }
        each_block(tokens, [&](auto height, int64_t i) {
            constexpr int MR = least_int(decltype(height)::value, SQUARE / NR);
            finish.template block<MR, NR>(first + i, j, sums + i * NR);
        });
    }
}

// The same against rows `range` of right.
template <class Finish>
static void multiply_pairs(int64_t m, const Range& range, int64_t depth, const bf16* left, int64_t ldl,
                           const bf16* right, int64_t ldr, const Finish& finish) {
    int64_t j = range.begin;
    for (; m <= 2 && j + 8 <= range.end; j += 8)
        multiply_pairs<8>(m, j, depth, left, ldl, right + j * ldr, ldr, finish);
    for (; j + 4 <= range.end; j += 4) multiply_pairs<4>(m, j, depth, left, ldl, right + j * ldr, ldr, finish);
    for (; j < range.end; ++j) multiply_pairs<1>(m, j, depth, left, ldl, right + j * ldr, ldr, finish);
}

// out[i * NR + j] = the lanes of sums[i * NR + j], added up.
template <int COUNT>
LORA_INLINE void sum_lanes_of(const FloatVector* sums, float (&out)[SQUARE]) {
    static_assert(COUNT <= SQUARE, "so many vectors are added up at once");
    FloatVector rows[SQUARE] = {};
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) rows[i] = sums[i];
    store(sum_each(rows), out);
}

// h (m, r) = factor (x * D) Aᵀ for A (r, k), or, turned, for one (k, r): dh is made of dy and B so. dropout's
// 1 / (1 - p) comes last.
struct PairedShrink {
    int64_t m, k, r;
    const bf16* x;
    int64_t ldx;
    const float* adapter;  // which bf16 holds exactly
    Dropout dropout;
    float* h;
    bool turned = false;
    float factor = 1.0f;

    int64_t ld() const { return round_up(k, PAIRED) + PAIRED; }  // a line more than a power of two
    // In floats: the adapter's rows, and for each task a strip of x, where it is dropped from.
    int64_t packed() const { return r * ld() / 2; }
    int64_t per_task() const { return dropout.active ? PAIRED_TOKENS * ld() / 2 : 0; }
    int64_t scratch(int64_t threads) const { return packed() + threads * per_task(); }

    // Columns `range` of the adapter's rows.
    void pack(const Range& range, bf16* rows) const {
        const int64_t end = range.end;
        if (!turned) return narrow_block(adapter + range.begin, k, r, end - range.begin, rows + range.begin, ld());
        int64_t q = 0;
        for (; q + SQUARE <= r; q += SQUARE) {
            int64_t j = range.begin;
            for (; j + SQUARE <= end; j += SQUARE) {
                FloatVector square[SQUARE];
#pragma GCC unroll 16
                for (int i = 0; i < SQUARE; ++i) square[i] = load(adapter + (j + i) * r + q);
                transpose_square<float>(square);
#pragma GCC unroll 16
                for (int i = 0; i < SQUARE; ++i) store(square[i], rows + (q + i) * ld() + j);
            }
            for (; j < end; ++j) {
                for (int i = 0; i < SQUARE; ++i) narrow(adapter[j * r + q + i], rows + (q + i) * ld() + j);
            }
        }
        for (; q < r; ++q) {
            for (int64_t j = range.begin; j < end; ++j) narrow(adapter[j * r + q], rows + q * ld() + j);
        }
    }

    struct Finish {
        int64_t r;
        float factor;
        float* h;
        template <int MR, int NR>
        void block(int64_t i, int64_t j, const FloatVector* sums) const {
            float all[SQUARE];
            sum_lanes_of<MR * NR>(sums, all);
            for (int row = 0; row < MR; ++row) {
                for (int column = 0; column < NR; ++column)
                    h[(i + row) * r + j + column] = all[row * NR + column] * factor;
            }
        }
    };

    void run(int64_t threads, float* scratch) const {
        bf16* rows = reinterpret_cast<bf16*>(scratch);
        const int64_t packers = least(threads, ceil_div(k, UNIT));
        run_tasks(packers, [&](int64_t task) { pack(share(k, UNIT, packers, task), rows); });
        const float last = dropout.active ? factor * static_cast<float>(dropout.scale) : factor;
        const int64_t tasks = least(threads, ceil_div(m, 4));
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(m, 4, tasks, task);
            bf16* strip = reinterpret_cast<bf16*>(scratch + packed() + task * per_task());
            for (int64_t i = range.begin; i < range.end; i += PAIRED_TOKENS) {
                const int64_t tokens = least(PAIRED_TOKENS, range.end - i);
                const bf16* left = x + i * ldx;
                if (dropout.active) copy_kept(left, ldx, tokens, k, strip, ld(), dropout, i, 0);
                multiply_pairs(tokens, Range{0, r}, k, dropout.active ? strip : left, dropout.active ? ld() : ldx, rows,
                               ld(), Finish{r, last, h + i * r});
            }
        });
    }
};

// db, and dh apart from it: dy is read twice, and dh takes a quarter of the time.
struct PairedTokenSums : TokenSums<float, bf16> {
    TokenSums<float, bf16> rest() const {
        TokenSums<float, bf16> others = *this;
        others.lower = nullptr;
        return others;
    }
    PairedShrink of_lower() const { return {m, n, r, left, ldl, adapter, NO_DROPOUT, lower, true, factor}; }
    bool alone() const { return sums == nullptr && total == nullptr; }

    int64_t scratch(int64_t threads) const {
        const int64_t first = lower == nullptr ? 0 : of_lower().scratch(threads),
                      second = alone() ? 0 : rest().scratch(threads);
        return first > second ? first : second;
    }
    void run(int64_t threads, float* scratch) const {
        if (lower != nullptr) of_lower().run(threads, scratch);
        if (!alone()) rest().run(threads, scratch);
    }
};

// y (m, n) = gain * l + bias with l = x weightᵀ + low lora_bᵀ, rounded once from fp32. W is read once.
struct PairedForward {
    int64_t m, n, k, r;
    const bf16* x;
    int64_t ldx;
    const bf16* weight;
    int64_t ldw;
    const float *low, *lora_b;  // low = s h (m, r), contiguous
    const float *bias, *gain;   // (n) or null
    bf16 *linear, *out;         // linear, l, may be null

    template <int MR, int NR>
    void block(int64_t i, int64_t j, const FloatVector* from) const {
        FloatVector sums[MR * NR];
        for (int at = 0; at < MR * NR; ++at) sums[at] = from[at];
        for (int64_t q = 0; q < r; q += lanes<float>) {
            FloatVector b[NR];
            for (int column = 0; column < NR; ++column) b[column] = load_some(lora_b + (j + column) * r + q, r - q);
            for (int row = 0; row < MR; ++row) {
                const FloatVector h = load_some(low + (i + row) * r + q, r - q);
                for (int column = 0; column < NR; ++column) sums[row * NR + column] += h * b[column];
            }
        }
        float all[SQUARE];
        sum_lanes_of<MR * NR>(sums, all);
        for (int row = 0; row < MR; ++row) {
            for (int column = 0; column < NR; ++column) {
                const int64_t at = (i + row) * n + j + column;
                const float sum = all[row * NR + column], offset = bias == nullptr ? 0.0f : bias[j + column];
                if (linear != nullptr) narrow(sum, linear + at);
                narrow(gain == nullptr ? sum + offset : sum * gain[j + column] + offset, out + at);
            }
        }
    }

    // Each task copies x, for rows a power of two apart share a few sets of the cache. In bf16, an even number.
    int64_t copied() const { return m > 4 ? m * ld() : 0; }
    int64_t ld() const { return round_up(k, PAIRED) + PAIRED; }
    void run(int64_t threads, bf16* scratch) const {
        const int64_t tasks = least(threads, ceil_div(n, 8));
        run_tasks(tasks, [&](int64_t task) {
            bf16* copy = scratch + task * copied();
            for (int64_t i = 0; copied() != 0 && i < m; ++i)
                __builtin_memcpy(copy + i * ld(), x + i * ldx, static_cast<size_t>(k) * sizeof(bf16));
            multiply_pairs(m, share(n, 8, tasks, task), k, copied() ? copy : x, copied() ? ld() : ldx, weight, ldw,
                           *this);
        });
    }
};

// sums (MR, PAIRED) += dy (MR, rows) weight (rows, PAIRED), of which `width` columns are read.
template <int MR>
LORA_INLINE void add_pairs_of_rows(int64_t width, int64_t rows, const bf16* dy, int64_t lddy, const bf16* weight,
                                   int64_t ldw, float* sums, int64_t lds) {
    typedef uint16_t HalfWords __attribute__((vector_size(LORA_VECTOR_BYTES)));
    FloatVector low[MR], high[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) low[i] = load(sums + i * lds), high[i] = load(sums + i * lds + SQUARE);
    const auto add = [&](HalfWords even, HalfWords odd, int64_t row, size_t bytes) __attribute__((always_inline)) {
        const FloatVector lower = (FloatVector)interleave<0>(even, odd), upper = (FloatVector)interleave<1>(even, odd);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
            uint32_t two = 0;
            __builtin_memcpy(&two, dy + i * lddy + row, bytes);
            const FloatVector both = (FloatVector)(WordVector{} + two);
            low[i] = add_pairs(low[i], both, lower);
            high[i] = add_pairs(high[i], both, upper);
        }
    };
    const auto read_row = [&](int64_t row) __attribute__((always_inline)) {
        const bf16* from = weight + row * ldw;
        return (HalfWords)(width >= PAIRED ? read_pairs(from) : read_pairs(from, width));
    };
    int64_t row = 0;
    for (; width >= PAIRED && row + 2 <= rows; row += 2) {
        const bf16* from = weight + row * ldw;
        __builtin_prefetch(from + 2 * PAIRED, 0, 2);
        __builtin_prefetch(from + 2 * PAIRED + ldw, 0, 2);
        add((HalfWords)read_pairs(from), (HalfWords)read_pairs(from + ldw), row, 4);
    }
    for (; row + 2 <= rows; row += 2) add(read_row(row), read_row(row + 1), row, 4);
    if (row < rows) add(read_row(row), HalfWords{}, row, 2);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) store(low[i], sums + i * lds), store(high[i], sums + i * lds + SQUARE);
}

// sums (m, columns), row distance lds, += dy (m, depth) weight (depth, columns). W is read once; what lies beyond
// columns, up to whole PAIRED, is of no account.
static void add_row_pairs(int64_t m, int64_t columns, int64_t depth, const bf16* dy, int64_t lddy, const bf16* weight,
                          int64_t ldw, float* sums, int64_t lds) {
    constexpr int64_t ROWS_OF_W = 64;  // whose products are added up in registers
    for (int64_t row = 0; row < depth; row += ROWS_OF_W) {
        const int64_t rows = least(ROWS_OF_W, depth - row);
        for (int64_t j = 0; j < columns; j += PAIRED) {
            const bf16* from = weight + row * ldw + j;
            const int64_t width = columns - j;
            int64_t i = 0;
            for (; i + 8 <= m; i += 8)
                add_pairs_of_rows<8>(width, rows, dy + i * lddy + row, lddy, from, ldw, sums + i * lds + j, lds);
            each_block(m - i, [&](auto height, int64_t at) {
                constexpr int MR = decltype(height)::value;
                const int64_t token = i + at;
                add_pairs_of_rows<MR>(width, rows, dy + token * lddy + row, lddy, from, ldw, sums + token * lds + j,
                                      lds);
            });
        }
    }
}
#endif

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
