// The low-rank parts of y or dx alone, where the library multiplies by W: each element is summed in registers, rounded
// and written once.
#pragma once

#include "products.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

// Registers: TILE_HEIGHT x TILE_PANELS panels of sums. More rows would be written at once than a set of the first-level
// cache holds lines, for rows lie a power of two apart.
constexpr int TILE_HEIGHT = 6, TILE_PANELS = LORA_VECTOR_BYTES == 64 ? 2 : 1;

template <class T, class E>
LORA_INLINE void store_two(Vector<T> first, Vector<T> second, E* p) {
#if defined(__AVX512BF16__)
    if constexpr (__is_same(E, bf16)) return write(p, (FloatVector)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#endif
    store(first, p), store(second, p + lanes<T>);
}

// out (m, n) = factor Σ low adapter + bias; adapter is (n, r) where it is transposed, else (r, n). No term has dropout.
template <class T, class E>
struct LowRankProduct {
    static constexpr int64_t COLUMNS = 256;  // whose panels stay in the first-level cache for all rows
    static constexpr int VECTORS = TILE_PANELS * PANEL_VECTORS;

    int64_t m, n;
    const Term* terms;
    int64_t count;
    bool transposed;
    T factor;
    const T* bias;  // (n) or null
    E* out;         // contiguous

    int64_t scratch_per_task() const {
        int64_t depth = 0;
        for (int64_t t = 0; t < count; ++t) depth += terms[t].r;
        return COLUMNS * depth;
    }

    // Panels of columns [j, j + columns) of each adapter, one after the other.
    void pack(int64_t j, int64_t columns, T* panels) const {
        for (int64_t t = 0; t < count; ++t) {
            const int64_t r = terms[t].r;
            const T* adapter = static_cast<const T*>(terms[t].adapter);
            if (transposed) {
                pack_columns(adapter + j * r, r, r, columns, factor, panels);
            } else {
                pack_rows(adapter + j, n, r, columns, factor, panels);
            }
            panels += COLUMNS * r;
        }
    }

    // sums (MR, PANELS) of rows from i on and of the panels that begin `within` columns after the packed ones do.
    template <int MR, int PANELS>
    __attribute__((always_inline)) void add_up_block(int64_t i, int64_t within, const T* panels,
                                                     Vector<T> (&sums)[MR][VECTORS]) const {
        for (int64_t t = 0; t < count; ++t) {
            const int64_t r = terms[t].r, ld = terms[t].ldlow;
            const T *low = static_cast<const T*>(terms[t].low) + i * ld, *panel = panels + within * r;
            for (int64_t q = 0; q < r; ++q) {
                Vector<T> b[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < PANELS * PANEL_VECTORS; ++v)
                    b[v] = load(panel + v / PANEL_VECTORS * r * PANEL<T> + q * PANEL<T> + v % PANEL_VECTORS * lanes<T>);
#pragma GCC unroll 6
                for (int row = 0; row < MR; ++row) {
#pragma GCC unroll 4
                    for (int v = 0; v < PANELS * PANEL_VECTORS; ++v) sums[row][v] += low[row * ld + q] * b[v];
                }
            }
            panels += COLUMNS * r;
        }
    }

    // Rows [i, i + MR) of PANELS panels from column j on.
    template <int MR, int PANELS>
    __attribute__((always_inline)) void block(int64_t i, int64_t j, int64_t within, const T* panels) const {
        constexpr int VL = lanes<T>;
        Vector<T> sums[MR][VECTORS] = {};
        add_up_block<MR, PANELS>(i, within, panels, sums);
        const int64_t columns = n - j;
        E* to = out + i * n + j;
        if (columns >= PANELS * PANEL<T>) {
#pragma GCC unroll 4
            for (int v = 0; v < PANELS * PANEL_VECTORS; v += 2) {
                Vector<T> first = {}, second = {};
                if (bias != nullptr) first = load(bias + j + v * VL), second = load(bias + j + (v + 1) * VL);
#pragma GCC unroll 6
                for (int row = 0; row < MR; ++row)
                    store_two<T>(sums[row][v] + first, sums[row][v + 1] + second, to + row * n + v * VL);
            }
            return;
        }
        T row_sums[PANELS * PANEL<T>];
        for (int row = 0; row < MR; ++row) {
#pragma GCC unroll 4
            for (int v = 0; v < PANELS * PANEL_VECTORS; ++v) store(sums[row][v], row_sums + v * VL);
            for (int64_t c = 0; c < columns; ++c)
                narrow(row_sums[c] + (bias == nullptr ? T(0) : bias[j + c]), to + row * n + c);
        }
    }

    template <int MR>
    void rows(int64_t i, int64_t j, int64_t columns, const T* panels) const {
        int64_t within = 0;
        for (; within + TILE_PANELS * PANEL<T> <= columns; within += TILE_PANELS * PANEL<T>)
            block<MR, TILE_PANELS>(i, j + within, within, panels);
        for (; within < columns; within += PANEL<T>) block<MR, 1>(i, j + within, within, panels);
    }

    void part(const Range& tokens, const Range& range, T* panels) const {
        for (int64_t j = range.begin; j < range.end; j += COLUMNS) {
            const int64_t columns = least(COLUMNS, range.end - j);
            pack(j, columns, panels);
            int64_t i = tokens.begin;
            for (; i + TILE_HEIGHT <= tokens.end; i += TILE_HEIGHT) rows<TILE_HEIGHT>(i, j, columns, panels);
            for (; i + 2 <= tokens.end; i += 2) rows<2>(i, j, columns, panels);
            if (i < tokens.end) rows<1>(i, j, columns, panels);
        }
    }

    // Tokens are cut among the tasks, as the library cuts them, which reads what is written here; columns too where
    // tokens are few, for each task packs the panels that it multiplies.
    void run(int64_t threads, T* scratch) const {
        if (n == 0) return;
        const int64_t down = least(threads, ceil_div(m, LOW_RANK_ROWS)),
                      across = least(threads / down, ceil_div(n, UNIT));
        run_tasks(across * down, [&](int64_t task) {
            part(share(m, TILE_HEIGHT, down, task / across), share(n, UNIT, across, task % across),
                 scratch + task * scratch_per_task());
        });
    }
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
