// Weights of codes: all their values, and the products of few tokens that read the codes themselves.
#pragma once

#include "eight_bits_few.h"
#include "four_bits_few.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

// Rows of W that are made while they are near.
template <class E>
struct CodedRows {
    Codes w;

    // Rows first .. first + count, which are of one block of 32, columns begin .. end, the first an even one. `bytes`
    // is `room` of so many columns.
    void make(int64_t first, int64_t count, int64_t begin, int64_t end, E* out, int64_t ldo, uint8_t* bytes) const {
        if (w.eight_bits) {
            for (int64_t i = 0; i < count; ++i) eight_bit_values(w.eight, first + i, begin, end, out + i * ldo);
            return;
        }
        const FourBits& four = w.four;
        const int64_t k = four.k, block = first / BLOCK_ROWS * BLOCK_ROWS, pairs = ceil_div(end - begin, 2);
        const bool by_columns = four.by_columns != nullptr;
        if (by_columns) codes_by_rows(four.codes + block * k / 2 + begin / 2 * BLOCK_ROWS, pairs, bytes);
        for (int64_t row = first; row < first + count; ++row) {
            const uint8_t* codes = by_columns ? bytes + (row - block) * pairs : four.codes + (row * k + begin) / 2;
            four_bit_values(four, row * k + begin, row * k + end, codes, out + (row - first) * ldo);
        }
    }
    int64_t room(int64_t columns) const {
        return !w.eight_bits && w.four.by_columns != nullptr ? BLOCK_ROWS * round_up(columns, 2) / 2 : 0;
    }
};

// The values of a part of W, or of all.
template <class E>
struct CodedValues {
    static constexpr int64_t COLUMNS = 512;  // of the order by columns, at a time

    Codes w;
    int64_t row, column, height, width;
    E* out;

    bool by_columns() const { return !w.eight_bits && w.four.by_columns != nullptr; }
    void rows(const Range& range) const {
        const int64_t piece = by_columns() ? COLUMNS : width;
        uint8_t bytes[BLOCK_ROWS * COLUMNS / 2];
        for (int64_t i = range.begin; i < range.end; i += BLOCK_ROWS) {
            const int64_t count = least(BLOCK_ROWS, range.end - i);
            for (int64_t at = 0; at < width; at += piece) {
                CodedRows<E>{w}.make(row + i, count, column + at, column + least(width, at + piece),
                                     out + i * width + at, width, bytes);
            }
        }
    }

    void run(int64_t threads) const {
        if (w.eight_bits || by_columns() || height != w.n() || width != w.k()) {
            const int64_t tasks = least(threads, ceil_div(height, BLOCK_ROWS));
            return run_tasks(tasks, [&](int64_t task) { rows(share(height, BLOCK_ROWS, tasks, task)); });
        }
        const FourBits& four = w.four;  // whose rows may begin amid a byte
        const int64_t total = four.n * four.k, blocks = ceil_div(total, four.blocksize), tasks = least(threads, blocks);
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(blocks, 1, tasks, task);
            const int64_t first = range.begin * four.blocksize;
            four_bit_values(four, first, least(total, range.end * four.blocksize), four.codes + first / 2, out + first);
        });
    }
};

// out = gain * (x Wᵀ + low lora_bᵀ) + bias for few tokens: some rows of W at a time.
template <class E>
struct FewCoded {
    static constexpr int64_t ROWS = in_pairs<E> ? 8 : 2 * WEIGHT_ROWS;

    CodedRows<E> weight;
    FewForward<float, E, E> output;  // its x is widened, but in pairs
    const E* x;
    int64_t ldx;

    void multiply(int64_t first, int64_t count, const E* rows, float* widened) const {
        FewForward<float, E, E> own = output.from_column(first);
#if LORA_PAIRS
        if constexpr (in_pairs<E>) {
            const FewForward<float, E, E>& o = own;
            const PairedForward paired = {o.m, o.n,   o.k,      o.r,    x,      ldx,      rows,
                                          o.k, o.low, o.lora_b, o.bias, o.gain, o.linear, o.out};
            return multiply_pairs(o.m, Range{0, count}, o.k, x, ldx, rows, o.k, paired);
        }
#endif
        own.weight = rows, own.ldw = own.k;
        int64_t j = 0;
        for (; j + WEIGHT_ROWS <= count; j += WEIGHT_ROWS) own.template columns<WEIGHT_ROWS>(j, widened);
        for (; j < count; ++j) own.template columns<1>(j, widened);
    }

    int64_t scratch_per_task() const { return round_up((ROWS + WEIGHT_ROWS) * output.k, 16); }
    void run(int64_t threads, float* scratch) const {
        const int64_t n = output.n, tasks = least(threads, ceil_div(n, ROWS));
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(n, ROWS, tasks, task);
            float* own = scratch + task * scratch_per_task();
            E* rows = reinterpret_cast<E*>(own + WEIGHT_ROWS * output.k);
            for (int64_t j = range.begin; j < range.end; j += ROWS) {
                const int64_t count = least(ROWS, range.end - j);
                weight.make(j, count, 0, output.k, rows, output.k, nullptr);
                multiply(j, count, rows, own);
            }
        });
    }
};

// dx = D * (dh A) + dy W for few tokens: each task a range of columns, of which blocks are made and used.
template <class E>
struct FewCodedInputGradient {
    static constexpr int64_t ROWS = BLOCK_ROWS, COLUMNS = 1024;

    CodedRows<E> weight;
    FewInputGradient<float, E> sum;

    void add_weight(const Term& term, int64_t j, int64_t columns, float* sums, E* block, uint8_t* bytes) const {
        const E* left = static_cast<const E*>(term.left);
        for (int64_t row = 0; row < term.depth; row += ROWS) {
            const int64_t count = least(ROWS, term.depth - row);
            for (int64_t at = 0; at < columns; at += COLUMNS) {
                const int64_t width = least(COLUMNS, columns - at);
                weight.make(row, count, j + at, j + at + width, block, COLUMNS, bytes);
                sum.add_rows_of(width, count, left + row, term.ldl, block, COLUMNS, sums + at);
            }
        }
    }

    int64_t block_room() const { return ROWS * COLUMNS * static_cast<int64_t>(sizeof(E)) / 4; }  // in floats, as all
    int64_t scratch_per_task() const {
        return round_up(sum.scratch_per_task() + block_room() + ceil_div(weight.room(COLUMNS), 4), 16);
    }
    void run(int64_t threads, float* scratch) const {
        const int64_t tasks = least(threads, ceil_div(sum.k, 64));
        run_tasks(tasks, [&](int64_t task) {
            float* own = scratch + task * scratch_per_task();
            float* block = own + sum.scratch_per_task();
            uint8_t* bytes = reinterpret_cast<uint8_t*>(block + block_room());
            sum.task(share(sum.k, 64, tasks, task), own,
                     [&](const Term& term, int64_t j, int64_t columns, float* sums) {
                         add_weight(term, j, columns, sums, reinterpret_cast<E*>(block), bytes);
                     });
        });
    }
};

// The kernels of a compute dtype; fp64 has none, for the packages make no values of it.
template <class T, class E>
struct CodedDriver {
    static void values(const CodedValuesCall& f) {
        if constexpr (sizeof(T) == 4) {
            const int64_t threads = useful_threads(f.threads, f.height * f.width * 4);
            CodedValues<E>{f.weight, f.row, f.column, f.height, f.width, static_cast<E*>(f.out)}.run(threads);
        }
    }

    static size_t product_scratch(const CodedProductCall& f) {
        if constexpr (sizeof(T) == 4) {
            const int64_t per_task = f.weight.eight_bits
                                         ? FewCoded<E>{{f.weight}, output_of(f, nullptr), nullptr, 0}.scratch_per_task()
                                         : four_bits(f, nullptr).scratch_per_task();
            return sizeof(T) * static_cast<size_t>(f.m * (f.weight.k() + f.r) + 16 + f.threads * per_task);
        }
        return 0;
    }
    static void product(const CodedProductCall& f) {
        if constexpr (sizeof(T) == 4) {
            if (f.m == 0) return;
            const int64_t k = f.weight.k(), threads = useful_threads(f.threads, f.m * f.weight.n() * k);
            float *x = static_cast<float*>(f.scratch), *low = x + f.m * k, *rest = x + round_up(f.m * (k + f.r), 16);
            const E* given = static_cast<const E*>(f.x);
            for (int64_t i = 0; i < f.m; ++i) {
                const float* h = static_cast<const float*>(f.low) + i * f.ldlow;
                for (int64_t q = 0; q < f.r; ++q) low[i * f.r + q] = h[q] * static_cast<float>(f.factor);
            }
            if (f.weight.eight_bits) {
                if (!in_pairs<E>) widen_block(given, f.ldx, f.m, k, x, k);
                if (!in_pairs<E> && f.m <= FewEightBits<E>::DIRECT)
                    return FewEightBits<E>{f.weight.eight, output_of(f, x)}.run(threads);
                return FewCoded<E>{{f.weight}, output_of(f, x), given, f.ldx}.run(threads, rest);
            }
            const FewFourBits<E> few = four_bits(f, x);
            if (few.pairs) {
                FewFourBits<E>::arrange_pairs(given, f.ldx, f.m, k, few.w.low_first, reinterpret_cast<E*>(x));
            } else {
                FewFourBits<E>::arrange(given, f.ldx, f.m, k, few.w.low_first, x);
            }
            few.run(threads, rest);
        }
    }

    static size_t input_grad_scratch(const CodedInputGradCall& f) {
        if constexpr (sizeof(T) == 4) {
            if (f.m == 0) return 0;
            return sizeof(T) * static_cast<size_t>(f.threads * input_gradient(f).scratch_per_task());
        }
        return 0;
    }
    static void input_grad(const CodedInputGradCall& f) {
        if constexpr (sizeof(T) == 4) {
            if (f.m == 0) return;
            const int64_t work = f.m * f.weight.n() * f.weight.k();
            input_gradient(f).run(useful_threads(f.threads, work), static_cast<float*>(f.scratch));
        }
    }

  private:
    static FewForward<float, E, E> output_of(const CodedProductCall& f, const float* x) {
        const auto adapter = [](const void* p) { return static_cast<const float*>(p); };
        const int64_t k = f.weight.k();
        const float* low = x == nullptr ? nullptr : x + f.m * k;
        return {f.m,
                f.weight.n(),
                k,
                f.r,
                x,
                nullptr,
                0,
                low,
                adapter(f.lora_b),
                adapter(f.bias),
                adapter(f.gain),
                static_cast<E*>(f.linear),
                static_cast<E*>(f.out)};
    }
    static FewFourBits<E> four_bits(const CodedProductCall& f, const float* x) {
        const FourBits& w = f.weight.four;
        const int64_t segment = FewFourBits<E>::segment_of(w);
        return {w, output_of(f, x), segment, w.k / segment, FewFourBits<E>::takes_pairs(segment)};
    }
    static FewCodedInputGradient<E> input_gradient(const CodedInputGradCall& f) {
        return {{f.weight}, {f.m, f.weight.k(), &f.term, 1, static_cast<E*>(f.out)}};
    }
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
