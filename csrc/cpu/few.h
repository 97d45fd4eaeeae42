// Few tokens: W is read once, straight from memory, and everything else stays in the caches.
//
// Forward walks W's rows (dot products along k), backward walks them too (a row of W, times dy's element, is added to
// dx), so both read W in its own order.
#pragma once

#include "pairs.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

constexpr int64_t WORK_PER_THREAD = 1 << 18;  // multiply-adds below which another thread costs more than it saves
constexpr int64_t WORK_PER_ELEMENT = 8;       // in multiply-adds, of one that is read from memory, changed and written

LORA_INLINE int64_t useful_threads(int64_t threads, int64_t work) {
    const int64_t most = work / WORK_PER_THREAD + 1;
    return least(threads, most);
}

// Above these many tokens packing W pays, or the adapter.
constexpr int64_t FEW_TOKENS_BACKWARD = 8;
template <class E>
constexpr int64_t FEW_TOKENS_FORWARD = in_pairs<E> ? 32 : 16;
template <class E>
constexpr int64_t FEW_TOKENS_INPUT_GRAD = in_pairs<E> ? 32 : FEW_TOKENS_BACKWARD;
template <class E>
constexpr int64_t FEW_TOKENS_SHRINK = in_pairs<E> ? 4 : 16;

#if LORA_VECTOR_BYTES == 64
constexpr int WEIGHT_ROWS = 6;
#else
constexpr int WEIGHT_ROWS = 4;
#endif

// sums[i][j] += x_i · w_j over k: rows i of x (T, widened), rows j of w (E).
template <class T, class E, int MR, int NR>
LORA_INLINE void dot_rows(int64_t k, const T* x, int64_t ldx, const E* w, int64_t ldw, Vector<T> (&sums)[MR][NR]) {
    constexpr int VL = lanes<T>;
    int64_t at = 0;
    for (; at + VL <= k; at += VL) {
        Vector<T> right[NR];
#pragma GCC unroll 8
        for (int j = 0; j < NR; ++j) right[j] = load(w + j * ldw + at);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
            const Vector<T> left = load(x + i * ldx + at);
#pragma GCC unroll 8
            for (int j = 0; j < NR; ++j) sums[i][j] += left * right[j];
        }
    }
    if (at < k) {
        for (int j = 0; j < NR; ++j) {
            const Vector<T> right = load_part(w + j * ldw + at, k - at);
            for (int i = 0; i < MR; ++i) sums[i][j] += load_part(x + i * ldx + at, k - at) * right;
        }
    }
}

// out (m, n) = gain * l + bias with l = x weightᵀ + low lora_bᵀ, rounded once from T.
template <class T, class E, class Out>
struct FewForward {
    int64_t m, n, k, r;
    const T* x;  // (m, k), widened, contiguous
    const E* weight;
    int64_t ldw;
    const T *low, *lora_b;  // low = s h (m, r)
    const T *bias, *gain;   // (n) or null
    Out *linear, *out;      // linear, l, may be null

    // That of W's rows from `first` on: the same matrices, moved. Its weight is to be set.
    FewForward from_column(int64_t first) const {
        FewForward moved = *this;
        if (r > 0) moved.lora_b += first * r;
        if (bias != nullptr) moved.bias += first;
        if (gain != nullptr) moved.gain += first;
        if (linear != nullptr) moved.linear += first;
        moved.out += first;
        return moved;
    }

    template <int MR, int NR, class W>
    void block(int64_t i, int64_t j, const W* rows, int64_t ldr) const {
        Vector<T> sums[MR][NR] = {};
        dot_rows<T, W, MR, NR>(k, x + i * k, k, rows, ldr, sums);
        finish(i, j, sums);
    }

    // The low-rank part onto the sums, and the results.
    template <int MR, int NR>
    void finish(int64_t i, int64_t j, Vector<T> (&sums)[MR][NR]) const {
        if (r > 0) dot_rows<T, T, MR, NR>(r, low + i * r, r, lora_b + j * r, r, sums);
        for (int row = 0; row < MR; ++row) {
            for (int column = 0; column < NR; ++column) {
                const int64_t at = (i + row) * n + j + column;
                const T sum = sum_lanes(sums[row][column]), offset = bias == nullptr ? T(0) : bias[j + column];
                if (linear != nullptr) narrow(sum, linear + at);
                narrow(gain == nullptr ? sum + offset : sum * gain[j + column] + offset, out + at);
            }
        }
    }

    template <int NR, class W>
    void tokens(int64_t j, const W* rows, int64_t ldr) const {
        int64_t i = 0;
        for (; i + 3 <= m && m - i != 4; i += 3) block<3, NR>(i, j, rows, ldr);
        for (; i + 2 <= m; i += 2) block<2, NR>(i, j, rows, ldr);
        if (i < m) block<1, NR>(i, j, rows, ldr);
    }

    // Rows j .. j + NR of W; widened once where several blocks of tokens read them.
    template <int NR>
    void columns(int64_t j, T* widened) const {
        const E* rows = weight + j * ldw;
        if (sizeof(E) == sizeof(T) || m <= 3) return tokens<NR>(j, rows, ldw);
        widen_block(rows, ldw, NR, k, widened, k);
        tokens<NR>(j, widened, k);
    }

    int64_t scratch(int64_t threads) const { return threads * WEIGHT_ROWS * k; }
    void run(int64_t threads, T* scratch) const {
        const int64_t tasks = least(threads, ceil_div(n, WEIGHT_ROWS));
        run_tasks(tasks, [&](int64_t index) {
            const Range range = share(n, WEIGHT_ROWS, tasks, index);
            T* widened = scratch + index * WEIGHT_ROWS * k;
            int64_t j = range.begin;
            for (; j + WEIGHT_ROWS <= range.end; j += WEIGHT_ROWS) columns<WEIGHT_ROWS>(j, widened);
            for (; j < range.end; ++j) columns<1>(j, widened);
        });
    }
};

// What dy alone gives, for a range of its columns: lower (m, r) = s dy B, db (n, r) = s dyᵀ h, dbias (n) = Σ dy.
template <class T, class E>
struct FewOutputGradients {
    static constexpr int UNROLL = 4;

    int64_t m, n, r;
    const E* dy;
    int64_t lddy;
    T scaling;
    const T *lora_b, *h;
    int64_t ldh;
    T *dh, *db, *dbias;  // null: not due

    // lower (r) += Σ_j factors[j] B[j] over columns of the range; four chains of sums, added in a fixed order.
    void reduce(const Range& range, const T* factors, T* lower) const {
        constexpr int VL = lanes<T>;
        int64_t q = 0;
        for (; q + VL <= r; q += VL) {
            Vector<T> chains[UNROLL] = {};
            int64_t j = range.begin;
            for (; j + UNROLL <= range.end; j += UNROLL) {
#pragma GCC unroll 4
                for (int u = 0; u < UNROLL; ++u)
                    chains[u] += factors[j - range.begin + u] * load(lora_b + (j + u) * r + q);
            }
            for (; j < range.end; ++j) chains[0] += factors[j - range.begin] * load(lora_b + j * r + q);
            store((chains[0] + chains[1]) + (chains[2] + chains[3]), lower + q);
        }
        for (; q < r; ++q) {
            T sum = 0;
            for (int64_t j = range.begin; j < range.end; ++j) sum += factors[j - range.begin] * lora_b[j * r + q];
            lower[q] = sum;
        }
    }

    void task(const Range& range, T* lower, T* factors) const {
        const int64_t width = range.end - range.begin;
        if (dbias != nullptr) fill(dbias + range.begin, width, T(0));
        for (int64_t i = 0; i < m; ++i) {
            widen_block(dy + i * lddy + range.begin, lddy, 1, width, factors, width);
            for (int64_t j = 0; dbias != nullptr && j < width; ++j) dbias[range.begin + j] += factors[j];
            for (int64_t j = 0; j < width; ++j) factors[j] *= scaling;
            if (dh != nullptr) reduce(range, factors, lower + i * r);
            for (int64_t j = 0; db != nullptr && j < width; ++j) {
                T* row = db + (range.begin + j) * r;
                for (int64_t q = 0; q < r; ++q) row[q] = (i == 0 ? T(0) : row[q]) + factors[j] * h[i * ldh + q];
            }
        }
    }

    int64_t tasks(int64_t threads) const { return n == 0 ? 1 : least(threads, ceil_div(n, 64)); }
    int64_t scratch(int64_t threads) const { return tasks(threads) * (m * r + n); }
    void run(int64_t threads, T* scratch) const {
        const int64_t count = tasks(threads), size = m * r + n;
        run_tasks(count, [&](int64_t index) {
            task(share(n, 64, count, index), scratch + index * size, scratch + index * size + m * r);
        });
        for (int64_t q = 0; dh != nullptr && q < m * r; ++q) {
            T sum = scratch[q];
            for (int64_t index = 1; index < count; ++index) sum += scratch[index * size + q];
            dh[q] = sum;
        }
    }
};

// da (r, k) = dhᵀ (x * D).
template <class T, class E>
struct FewAdapterGradient {
    int64_t m, k, r;
    const E* x;
    int64_t ldx;
    const T* dh;
    int64_t lddh;
    Dropout dropout;
    T* da;

    int64_t scratch(int64_t threads) const { return m * (k + threads * 64); }
    void run(int64_t threads, T* scratch) const {
        const int64_t tasks = least(threads, ceil_div(k, 64));
        run_tasks(tasks, [&](int64_t index) {
            const Range range = share(k, 64, tasks, index);
            const int64_t width = range.end - range.begin;
            T* tokens = scratch + m * range.begin;
            widen_block(x + range.begin, ldx, m, width, tokens, width, dropout, 0, range.begin);
            for (int64_t q = 0; q < r; ++q) {
                T* row = da + q * k + range.begin;
                for (int64_t i = 0; i < m; ++i) {
                    const T factor = dh[i * lddh + q];
                    for (int64_t j = 0; j < width; ++j)
                        row[j] = (i == 0 ? T(0) : row[j]) + factor * tokens[i * width + j];
                }
            }
        });
    }
};

// dx (m, k) = Σ_terms D * (dh A) + dy W, for a range of columns: SPAN / m columns of sums at a time, STEP rows of W at
// a time. Every term has its weight.
template <class T, class E>
struct FewInputGradient {
    static constexpr int64_t SPAN = in_pairs<E> ? 32768 : 8192;
    static constexpr int STEP = 8;

    int64_t m, k;
    const Term* terms;
    int64_t count;
    E* dx;

    // sums (m, columns) += factors (m, STEP) rows (STEP, columns)
    template <class S>
    void add_rows(int64_t columns, const T* factors, const S* rows, int64_t ldr, int steps, T* sums,
                  int64_t lds) const {
        constexpr int VL = lanes<T>;
        int64_t j = 0;
        for (; steps == STEP && j + VL <= columns; j += VL) {
            Vector<T> right[STEP];
#pragma GCC unroll 8
            for (int s = 0; s < STEP; ++s) right[s] = load(rows + s * ldr + j);
            for (int64_t i = 0; i < m; ++i) {
                Vector<T> even = load(sums + i * lds + j), odd = {};
#pragma GCC unroll 4
                for (int s = 0; s < STEP; s += 2) {
                    even += factors[i * STEP + s] * right[s];
                    odd += factors[i * STEP + s + 1] * right[s + 1];
                }
                store(even + odd, sums + i * lds + j);
            }
        }
        for (; j < columns; ++j) {
            for (int64_t i = 0; i < m; ++i) {
                T sum = sums[i * lds + j];
                for (int s = 0; s < steps; ++s) sum += factors[i * STEP + s] * widen(rows[s * ldr + j]);
                sums[i * lds + j] = sum;
            }
        }
    }

    // sums (m, columns) += left (m, depth) rows (depth, columns)
    template <class L, class S>
    void add_product(int64_t columns, int64_t depth, const L* left, int64_t ldl, const S* rows, int64_t ldr,
                     T* sums) const {
        T factors[(FEW_TOKENS_INPUT_GRAD<E> > CODED_TOKENS ? FEW_TOKENS_INPUT_GRAD<E> : CODED_TOKENS) * STEP];
        for (int64_t s = 0; s < depth; s += STEP) {
            const int steps = static_cast<int>(least(STEP, depth - s));
            for (int64_t i = 0; i < m; ++i) {
                for (int q = 0; q < steps; ++q) factors[i * STEP + q] = widen(left[i * ldl + s + q]);
            }
            add_rows(columns, factors, rows + s * ldr, ldr, steps, sums, span());
        }
    }

    // sums (m, columns) += left W, of W's columns from j on.
    void add_weight(const Term& term, int64_t j, int64_t columns, T* sums) const {
        const E *left = static_cast<const E*>(term.left), *weight = static_cast<const E*>(term.weight) + j;
        add_rows_of(columns, term.depth, left, term.ldl, weight, term.ldw, sums);
    }
    void add_rows_of(int64_t columns, int64_t depth, const E* left, int64_t ldl, const E* rows, int64_t ldr,
                     T* sums) const {
#if LORA_PAIRS
        if constexpr (in_pairs<E>) return add_row_pairs(m, columns, depth, left, ldl, rows, ldr, sums, span());
#endif
        add_product(columns, depth, left, ldl, rows, ldr, sums);
    }

    // add(term, j, columns, sums) is `add_weight`, or stands for it.
    template <class Add>
    void task(const Range& range, T* sums, const Add& add) const {
        T* spare = sums + m * span();
        for (int64_t j = range.begin; j < range.end; j += span()) {
            const int64_t columns = least(span(), range.end - j);
            fill(sums, m * span(), T(0));
            for (int64_t t = 0; t < count; ++t) {
                const Term& term = terms[t];
                if (term.r == 0) continue;
                const bool apart = is_apart(terms, t);
                T* into = apart ? spare : sums;
                if (apart) fill(spare, m * span(), T(0));
                add_product(columns, term.r, static_cast<const T*>(term.low), term.ldlow,
                            static_cast<const T*>(term.adapter) + j, k, into);
                if (term.dropout.active) drop_block(into, span(), m, columns, into, span(), term.dropout, 0, j);
                if (apart) add_to(sums, spare, m * span());
            }
            for (int64_t t = 0; t < count; ++t) add(terms[t], j, columns, sums);
            narrow_block(sums, span(), m, columns, dx + j, k);
        }
    }

    // A line more than a power of two, where all of W's pairs go down the same columns of the sums.
    int64_t span() const { return round_up(SPAN / m, 64) + (in_pairs<E> ? DROPOUT_WORD : 0); }
    int64_t scratch_per_task() const { return (any_apart(terms, count) ? 2 : 1) * m * span(); }
    void run(int64_t threads, T* scratch) const {
        const int64_t tasks = least(threads, ceil_div(k, 64));
        run_tasks(tasks, [&](int64_t index) {
            task(share(k, 64, tasks, index), scratch + index * scratch_per_task(),
                 [this](const Term& term, int64_t j, int64_t columns, T* sums) { add_weight(term, j, columns, sums); });
        });
    }
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
