// Few tokens in AMX's tiles.
#pragma once

#include "few.h"
#include "tiled.h"

#if LORA_TILES
namespace lora_kernels {
namespace LORA_CAPABILITY {

// Up to here vectors take y's few tokens: they read W as fast as memory gives it.
constexpr int64_t FEW_TOKENS_IN_VECTORS = 4;

// y of few tokens: W is read once, straight from memory, as the left operand, so that only x is packed:
// yᵀ (n, m) = W xᵀ + B (s h)ᵀ, turned as it is rounded.
struct TiledFewForward {
    static constexpr int64_t MOST = 64;  // tokens: above, packing W pays

    int64_t m, n, k, r;
    const bf16* x;
    int64_t ldx;
    const bf16* weight;
    int64_t ldw;
    const float* low;  // h (m, r)
    int64_t ldlow;
    float factor;
    const float* lora_b;
    const float *bias, *gain;  // (n) or null
    bf16 *linear, *out;        // linear may be null

    // Up to TILED_STRIP tokens' sums stay in the tiles all along k; more tokens go over W's rows again, in the cache.
    int64_t depth() const { return m <= TILED_STRIP && k > 0 ? padded_depth(k) : TILED_DEPTH; }
    int64_t blocks() const { return ceil_div(k, depth()); }
    int64_t columns() const { return round_up(m, TILED_STRIP); }
    int64_t low_depth() const { return padded_depth(LOW_PARTS * r); }
    int64_t packed_low() const { return low_depth() * columns(); }
    int64_t rows_of_low() const { return (low_depth() + STRIP_GAP) * columns(); }
    // In bf16: panels of x, of h, h's rows; for each task sums and what is turned of them, of floats, and a strip.
    int64_t shared() const { return padded_depth(k) * columns() + packed_low() + rows_of_low(); }
    int64_t strip() const { return TILED_STRIP * (low_depth() + TILE_DEPTH + STRIP_GAP); }
    int64_t per_task() const { return 2 * 2 * TILED_STRIP * columns() + strip(); }
    int64_t scratch(int64_t threads) const { return (shared() + threads * per_task()) / 2; }

    void pack(bf16* panels, int64_t threads) const {
        const int64_t packers = least(threads, blocks());
        run_tasks(packers, [&](int64_t task) {
            const Range range = share(blocks(), 1, packers, task);
            for (int64_t block = range.begin; block < range.end; ++block) {
                const int64_t k0 = block * depth();
                pack_pairs_across(x + k0, ldx, least(depth(), k - k0), m, panels + k0 * columns());
            }
        });
        bf16* low_panels = panels + padded_depth(k) * columns();
        bf16* rows = low_panels + packed_low();
        const int64_t ld = low_depth() + STRIP_GAP;
        split_rows(low, ldlow, m, r, factor, rows, ld);
        pack_pairs_across(rows, ld, LOW_PARTS * r, m, low_panels);
    }

    // c (rows, m) += W's rows j .. j + rows, of which whole tiles are read where they lie.
    void add_base(int64_t j, int64_t rows, const bf16* panels, float* c, bf16* strip) const {
        const bf16* from = weight + j * ldw;
        for (int64_t k0 = 0; k0 < k; k0 += depth()) {
            const int64_t length = least(depth(), k - k0),
                          whole = rows == TILED_STRIP ? length / TILE_DEPTH * TILE_DEPTH : 0;
            const bf16* panel = panels + k0 * columns();
            add_columns(rows, whole, padded_depth(length), from + k0, ldw, panel, c);
            for (int64_t at = whole; at < length; at += TILE_DEPTH) {
                copy_padded(from + k0 + at, ldw, rows, least(TILE_DEPTH, length - at), strip, TILE_DEPTH, NO_DROPOUT, 0,
                            0);
                add_columns(rows, TILE_DEPTH, padded_depth(length), strip, TILE_DEPTH, panel + at * TILE_SIDE, c);
            }
        }
    }

    // c (rows, m) += left (rows, depth) and as much of panels that are panel_depth deep.
    void add_columns(int64_t rows, int64_t depth, int64_t panel_depth, const bf16* left, int64_t ldl,
                     const bf16* panels, float* c) const {
        if (depth == 0) return;
        for (int64_t i = 0; i < m; i += TILED_STRIP) {
            const int64_t wide = least(TILED_STRIP, m - i);
            multiply_strip<true>(rows, wide, depth, left, ldl, panels + i * panel_depth, panel_depth, c + i, columns());
        }
    }

    void finish(int64_t j, int64_t rows, const float* c, float* turned) const {
        for (int64_t i = 0; i < columns(); i += WORDS) {
            for (int64_t row = 0; row < TILED_STRIP; row += WORDS) {
                FloatVector square[WORDS];
#pragma GCC unroll 16
                for (int q = 0; q < WORDS; ++q) square[q] = load(c + (row + q) * columns() + i);
                transpose_square<float>(square);
#pragma GCC unroll 16
                for (int q = 0; q < WORDS; ++q) store(square[q], turned + (i + q) * TILED_STRIP + row);
            }
        }
        if (linear != nullptr) narrow_block(turned, TILED_STRIP, m, rows, linear + j, n);
        if (gain == nullptr) return narrow_block(turned, TILED_STRIP, m, rows, out + j, n);
        scale_block(turned, TILED_STRIP, m, rows, gain + j, bias == nullptr ? nullptr : bias + j, out + j, n);
    }

    void run(int64_t threads, float* scratch) const {
        bf16* panels = reinterpret_cast<bf16*>(scratch);
        const bf16* low_panels = panels + padded_depth(k) * columns();
        pack(panels, threads);
        const int64_t tasks = least(threads, ceil_div(n, TILED_STRIP)), ld = low_depth() + STRIP_GAP;
        run_tasks(tasks, [&](int64_t task) {
            const Tiles configured;
            const Range range = share(n, TILED_STRIP, tasks, task);
            bf16* own = panels + shared() + task * per_task();
            float* c = reinterpret_cast<float*>(own);
            float* turned = c + TILED_STRIP * columns();
            bf16* strip = reinterpret_cast<bf16*>(turned + TILED_STRIP * columns());
            for (int64_t j = range.begin; j < range.end; j += TILED_STRIP) {
                const int64_t rows = least(TILED_STRIP, range.end - j);
                for (int64_t row = 0; row < TILED_STRIP; ++row) {
                    const bool starts = bias != nullptr && gain == nullptr && row < rows;
                    fill(c + row * columns(), columns(), starts ? bias[j + row] : 0.0f);
                }
                repeat_rows(lora_b + j * r, rows, r, strip, ld);
                add_columns(rows, low_depth(), low_depth(), strip, ld, low_panels, c);
                add_base(j, rows, panels, c, strip);
                finish(j, rows, c, turned);
            }
        });
    }
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
#endif
