// What a mixture does with the rows of its experts: adds them to their tokens, and weighs those of the gradient.
#pragma once

#include "products.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

// sums[tokens[i]] += factors[i] * rows[i] in the order of i. Rows of one token follow each other and lie in one task.
template <class T, class E>
struct WeightedSum {
    int64_t m, n;
    const E* rows;  // (m, n), contiguous
    const int64_t* tokens;
    const T* factors;  // null: 1
    T* sums;           // (tokens, n), contiguous

    void row(int64_t i) const {
        constexpr int VL = lanes<T>;
        const E* from = rows + i * n;
        T* to = sums + tokens[i] * n;
        const T factor = factors == nullptr ? T(1) : factors[i];
        int64_t j = 0;
        for (; j + VL <= n; j += VL) store(load(to + j) + factor * load(from + j), to + j);
        for (; j < n; ++j) to[j] += factor * static_cast<T>(widen(from[j]));
    }

    int64_t moved(int64_t i) const {  // on to where another token begins
        while (i > 0 && i < m && tokens[i] == tokens[i - 1]) ++i;
        return i;
    }

    void run(int64_t threads) const {
        const int64_t tasks = least(threads, m);
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(m, 1, tasks, task);
            for (int64_t i = moved(range.begin), end = moved(range.end); i < end; ++i) row(i);
        });
    }
};

// products[i] = <rows[i], grads[i]>, and then grads[i] *= factors[i].
template <class T, class E>
struct Weighing {
    int64_t m, n;
    const E* rows;  // (m, n), as grads; contiguous
    const T* factors;
    E* grads;
    T* products;  // null: not due

    T product(const E* left, const E* right) const {
        constexpr int VL = lanes<T>, CHAINS = 4;
        Vector<T> sums[CHAINS] = {};
        int64_t j = 0;
        for (; j + CHAINS * VL <= n; j += CHAINS * VL) {
#pragma GCC unroll 4
            for (int chain = 0; chain < CHAINS; ++chain)
                sums[chain] += load(left + j + chain * VL) * load(right + j + chain * VL);
        }
        for (; j + VL <= n; j += VL) sums[0] += load(left + j) * load(right + j);
        if (j < n) sums[1] += load_part(left + j, n - j) * load_part(right + j, n - j);
        return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }

    void run(int64_t threads) const {
        constexpr int VL = lanes<T>;
        const int64_t tasks = least(threads, m);
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(m, 1, tasks, task);
            for (int64_t i = range.begin; i < range.end; ++i) {
                E* to = grads + i * n;
                if (products != nullptr) products[i] = product(rows + i * n, to);
                int64_t j = 0;
                for (; j + VL <= n; j += VL) store(factors[i] * load(to + j), to + j);
                for (; j < n; ++j) narrow(factors[i] * static_cast<T>(widen(to[j])), to + j);
            }
        });
    }
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
