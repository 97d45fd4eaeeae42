// What DoRA adds: the gain of y's columns, its gradient, and the norms of W + s B A that it is made of. All of them are
// bound by memory, so each reads its large operands once.
#pragma once

#include "products.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

// dlinear (m, n) = gain * dy, dgain (n) = Σ_m dy * linear, dbias (n) = Σ_m dy. Columns are cut among the tasks, so a
// sum is whole in one of them; it grows in T over RUN tokens, and over the runs in fp64.
template <class T, class E>
struct GainGradients {
    static constexpr int64_t RUN = 16, COLUMNS = 512;

    int64_t m, n;
    const E* dy;
    int64_t lddy;
    const E* linear;  // read where dgain is due
    int64_t ldl;
    const T* gain;
    E* dlinear;
    T *dgain, *dbias;  // null: not due

    void block(int64_t j0, int64_t columns) const {
        double gains[COLUMNS] = {}, biases[COLUMNS] = {};
        T gains_of_run[COLUMNS], biases_of_run[COLUMNS];
        for (int64_t i0 = 0; i0 < m; i0 += RUN) {
            fill(gains_of_run, columns, T(0));
            fill(biases_of_run, columns, T(0));
            for (int64_t i = i0; i < least(i0 + RUN, m); ++i) row(i, j0, columns, gains_of_run, biases_of_run);
            for (int64_t j = 0; j < columns; ++j) {
                gains[j] += static_cast<double>(gains_of_run[j]);
                biases[j] += static_cast<double>(biases_of_run[j]);
            }
        }
        for (int64_t j = 0; dgain != nullptr && j < columns; ++j) dgain[j0 + j] = static_cast<T>(gains[j]);
        for (int64_t j = 0; dbias != nullptr && j < columns; ++j) dbias[j0 + j] = static_cast<T>(biases[j]);
    }

    LORA_INLINE void add(const Vector<T>& value, T* sum) { store(load(sum) + value, sum); }

    void row(int64_t i, int64_t j0, int64_t columns, T* gains, T* biases) const {
        constexpr int VL = lanes<T>;
        const E* from = dy + i * lddy + j0;
        const E* beside = dgain == nullptr ? nullptr : linear + i * ldl + j0;
        E* to = dlinear + i * n + j0;
        int64_t j = 0;
        for (; j + VL <= columns; j += VL) {
            const Vector<T> value = load(from + j);
            store(value * load(gain + j0 + j), to + j);
            if (beside != nullptr) add(value * load(beside + j), gains + j);
            if (dbias != nullptr) add(value, biases + j);
        }
        for (; j < columns; ++j) {
            const T value = widen(from[j]);
            narrow(value * gain[j0 + j], to + j);
            if (beside != nullptr) gains[j] += value * widen(beside[j]);
            biases[j] += value;
        }
    }

    void run(int64_t threads) const {
        const int64_t tasks = least(threads, ceil_div(n, UNIT));
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(n, UNIT, tasks, task);
            for (int64_t j = range.begin; j < range.end; j += COLUMNS) block(j, least(COLUMNS, range.end - j));
        });
    }
};

// norms (n) = ‖W + s B A‖ of each row. The sum is made block by block in the cache, from one read of W (n, k), which
// may be stored as (k, n): across. Nothing cancels that would not in W + s B A itself.
template <class T, class E>
struct RowNorms {
    int64_t n, k, r;
    const E* weight;
    int64_t ldw;
    bool across;
    const T *lora_a, *lora_b;  // (r, k), (n, r), contiguous
    T scaling;
    T* norms;

    // Panels of s A, or where across of s Bᵀ, for all of its columns.
    int64_t packed_columns() const { return across ? n : k; }
    int64_t packed() const { return round_up(round_up(packed_columns(), DEPTH) * r, 16); }
    int64_t scratch(int64_t threads) const { return packed() + threads * STRIP * STRIP_STRIDE; }

    void pack(int64_t j, T* panels) const {
        const int64_t columns = least(DEPTH, packed_columns() - j);
        if (across) {
            pack_columns(lora_b + j * r, r, r, columns, scaling, panels + j * r);
        } else {
            pack_rows(lora_a + j, k, r, columns, scaling, panels + j * r);
        }
    }

    // c (rows, columns) = the block of W at (i, j), as it is stored, plus that of s B A.
    void block(int64_t i, int64_t j, int64_t rows, int64_t columns, const T* panels, T* c) const {
        widen_block(weight + i * ldw + j, ldw, rows, columns, c, STRIP_STRIDE);
        if (across) {
            multiply<T, false>(rows, columns, r, lora_a + i, k, panels + j * r, c, STRIP_STRIDE);
        } else {
            multiply<T, true>(rows, columns, r, lora_b + i * r, r, panels + j * r, c, STRIP_STRIDE);
        }
    }

    void rows_along(const Range& range, const T* panels, T* c) const {
        for (int64_t i = range.begin; i < range.end; i += STRIP) {
            const int64_t rows = least(STRIP, range.end - i);
            double sums[STRIP] = {};
            for (int64_t j = 0; j < k; j += DEPTH) {
                const int64_t columns = least(DEPTH, k - j);
                block(i, j, rows, columns, panels, c);
                for (int64_t row = 0; row < rows; ++row)
                    sums[row] += static_cast<double>(sum_of_squares(c + row * STRIP_STRIDE, columns));
            }
            for (int64_t row = 0; row < rows; ++row) norms[i + row] = static_cast<T>(__builtin_sqrt(sums[row]));
        }
    }

    void rows_across(const Range& range, const T* panels, T* c) const {
        for (int64_t j = range.begin; j < range.end; j += DEPTH) {
            const int64_t columns = least(DEPTH, range.end - j);
            double sums[DEPTH] = {};
            for (int64_t i = 0; i < k; i += STRIP) {
                const int64_t rows = least(STRIP, k - i);
                T squares[DEPTH] = {};
                block(i, j, rows, columns, panels, c);
                for (int64_t row = 0; row < rows; ++row) {
                    const T* values = c + row * STRIP_STRIDE;
                    for (int64_t q = 0; q < columns; ++q) squares[q] += values[q] * values[q];
                }
                for (int64_t q = 0; q < columns; ++q) sums[q] += static_cast<double>(squares[q]);
            }
            for (int64_t q = 0; q < columns; ++q) norms[j + q] = static_cast<T>(__builtin_sqrt(sums[q]));
        }
    }

    void run(int64_t threads, T* scratch) const {
        const int64_t blocks = ceil_div(packed_columns(), DEPTH), packers = least(threads, blocks);
        run_tasks(packers, [&](int64_t task) {
            const Range range = share(blocks, 1, packers, task);
            for (int64_t at = range.begin; at < range.end; ++at) pack(at * DEPTH, scratch);
        });
        const int64_t unit = across ? PANEL<T> : ROWS, tasks = least(threads, ceil_div(n, unit));
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(n, unit, tasks, task);
            T* c = scratch + packed() + task * STRIP * STRIP_STRIDE;
            if (across) {
                rows_across(range, scratch, c);
            } else {
                rows_along(range, scratch, c);
            }
        });
    }
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
