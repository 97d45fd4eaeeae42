// A layer's forward of few tokens in one go: h is a small part of the work, so that each task makes it for itself
// rather than wait for the others.
#pragma once

#include "conversion.h"

#if LORA_PAIRS
namespace lora_kernels {
namespace LORA_CAPABILITY {

struct FewLayer {
    const FewForwardCall& of;

    int64_t tasks(int64_t threads) const { return least(threads, ceil_div(of.n, 8)); }
    // Each task's columns are to be more than those of h, which every task makes.
    bool pays(int64_t threads) const {
        return of.m > 0 && of.m <= FEW_TOKENS_FORWARD<bf16> && tasks(threads) * 2 * of.r <= of.n;
    }

    // Rows a power of two apart share a few sets of the cache: those that are copied lie a line further apart.
    int64_t ld() const { return round_up(of.k, PAIRED) + PAIRED; }
    bool copies_x() const { return of.m > 4; }
    bool copies_a() const { return of.lora_a.dtype != Dtype::bf16 || (of.k > 1 && of.lora_a.column_stride != 1); }

    // In bytes, whole lines: h, and B's rows as T; and of each task A, x, and x with dropout as bf16, and its own h.
    static int64_t lines(int64_t bytes) { return round_up(bytes, LORA_VECTOR_BYTES); }
    int64_t b_bytes() const { return lines(of.n * of.r * 4); }
    int64_t a_bytes() const { return copies_a() ? lines(of.r * ld() * 2) + lines(of.r * of.k * 4) : 0; }
    int64_t x_bytes() const { return of.m * ld() * 2; }
    int64_t h_bytes() const { return lines(of.m * of.r * 4); }
    int64_t per_task() const {
        return a_bytes() + (copies_x() ? x_bytes() : 0) + (of.dropout.active ? x_bytes() : 0) + 2 * h_bytes();
    }
    size_t scratch(int64_t threads) const { return static_cast<size_t>(b_bytes() + tasks(threads) * per_task()); }

    using Rounding = Conversion<float, bf16>;
    void copy_a(bf16* rows, float* widened) const {
        Rounding::rows_to(of.lora_a, Range{0, of.r}, of.k, widened);
        narrow_block(widened, of.k, of.r, of.k, rows, ld());
    }

    void run(int64_t threads) const {
        char* const memory = static_cast<char*>(of.scratch);
        float* const b = reinterpret_cast<float*>(memory);
        const int64_t count = tasks(threads);
        run_tasks(count, [&](int64_t task) {
            part(share(of.n, 8, count, task), task, b, memory + b_bytes() + task * per_task());
        });
    }

    void part(const Range& columns, int64_t task, float* b, char* at) const {
        const auto take = [&](int64_t bytes) {
            char* const start = at;
            at += bytes;
            return start;
        };
        const bf16 *a = static_cast<const bf16*>(of.lora_a.data), *x = static_cast<const bf16*>(of.x);
        int64_t lda = of.lora_a.row_stride, ldx = of.ldx;
        if (copies_a()) {
            bf16* const rows = reinterpret_cast<bf16*>(take(lines(of.r * ld() * 2)));
            copy_a(rows, reinterpret_cast<float*>(take(lines(of.r * of.k * 4))));
            a = rows, lda = ld();
        }
        const bf16* left = x;
        int64_t ldl = ldx;
        if (of.dropout.active) {
            bf16* const kept = reinterpret_cast<bf16*>(take(x_bytes()));
            copy_kept(x, ldx, of.m, of.k, kept, ld(), of.dropout, 0, 0);
            left = kept, ldl = ld();
        }
        if (copies_x()) {
            bf16* const copy = reinterpret_cast<bf16*>(take(x_bytes()));
            for (int64_t i = 0; i < of.m; ++i)
                __builtin_memcpy(copy + i * ld(), x + i * ldx, static_cast<size_t>(of.k) * sizeof(bf16));
            x = copy, ldx = ld();
            if (!of.dropout.active) left = copy, ldl = ld();
        }
        float* const h = task == 0 ? static_cast<float*>(of.h) : reinterpret_cast<float*>(take(h_bytes()));
        const float scale = of.dropout.active ? static_cast<float>(of.dropout.scale) : 1.0f;
        multiply_pairs(of.m, Range{0, of.r}, of.k, left, ldl, a, lda, PairedShrink::Finish{of.r, scale, h});

        float* const low = reinterpret_cast<float*>(take(h_bytes()));
        for (int64_t i = 0; i < of.m * of.r; ++i) low[i] = h[i] * static_cast<float>(of.factor);
        Rounding::rows_to(of.lora_b, columns, of.r, b);
        const PairedForward forward = {of.m,
                                       of.n,
                                       of.k,
                                       of.r,
                                       x,
                                       ldx,
                                       static_cast<const bf16*>(of.weight),
                                       of.ldw,
                                       low,
                                       b,
                                       static_cast<const float*>(of.bias),
                                       nullptr,
                                       nullptr,
                                       static_cast<bf16*>(of.out)};
        multiply_pairs(of.m, columns, of.k, x, ldx, forward.weight, of.ldw, forward);
    }
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
#endif
