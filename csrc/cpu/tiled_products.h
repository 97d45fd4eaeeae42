// The products of bf16 in AMX's tiles: y and dx of many tokens, h, and the sums over tokens. x, dy and W are multiplied
// as they are stored, and so are the adapters, which were rounded to bf16 before; h and dh, fp32, as several parts of
// bf16. Everything is summed in fp32, as in products.h.
//
// Counts, for one core; nothing here has been timed. A product of tiles (16 x 16 x 32) takes 16 cycles, a load of one
// 8, a store 16, and the result of a product comes 52 cycles later. Thousands of cycles for y of 512 tokens and r = 16,
// 2048 -> 2048 (in brackets 4096 -> 4096):
//   products of the base          4194 (16777)   4 products for 4 loads, from the first two caches
//   packing W                      524  (2097)   64 interleavings for 512 elements; dx takes half, pairs of rows only
//   strips of x, sums in and out   600  (2400)   once a block of depth; they overlap the products in part
//   h, and low rank of two parts    98   (197)   2.3 (1.2) per cent of the base; in fp32 vectors it was 16 times that
// The library packs W with every call as well, so what is ours alone are those last. y of 16 tokens multiplies for 213
// (852) and dx, with its packing, for 490 (1960), while W's 8 (32) MiB take 840 (3360) at 10 bytes a cycle: memory
// decides, as it does for one token, which vectors keep.
#pragma once

#include "tiled.h"

#if LORA_TILES
namespace lora_kernels {
namespace LORA_CAPABILITY {

constexpr int64_t TILED_ROWS = 512, TILED_COLUMNS = 512;  // of a tile of y or dx: W is packed once for its rows

struct TiledProduct : Product<float, bf16> {
    void plan(int64_t threads) {
        Product::plan(threads, has_base() ? TILED_ROWS : LOW_RANK_ROWS, TILED_COLUMNS, 4 * TILED_STRIP, TILED_STRIP,
                      TILED_STRIP);
    }

    // In elements of T: c, spare; in bf16: panels, a strip, an adapter's rows. As deep as a block, or as the parts.
    int64_t depth() const { return padded_depth(deepest(TILED_DEPTH / LOW_PARTS) * LOW_PARTS); }
    int64_t panels_size() const { return depth() * tile_columns; }
    int64_t strip_rows() const { return tile_rows > tile_columns ? tile_rows : tile_columns; }
    int64_t scratch_per_task() const {
        const int64_t words = panels_size() + strip_rows() * (depth() + STRIP_GAP);
        return (any_apart(terms, count) ? 2 : 1) * tile_size() + words / 2;
    }

    // The adapter's rows are there as often as h has parts; the factor is on h, for the adapter is exact in bf16.
    void add_low_rank(const Term& term, const Tile& at, float* c, int64_t ldc, bf16* panels, bf16* rows) const {
        const float* adapter = static_cast<const float*>(term.adapter);
        const float* low = static_cast<const float*>(term.low) + at.i * term.ldlow;
        const int64_t depth = LOW_PARTS * term.r, padded = padded_depth(depth), ld = padded + STRIP_GAP;
        if (transposed) {
            repeat_rows(adapter + at.j * term.r, at.columns, term.r, rows, ld);
            pack_pairs_across(rows, ld, depth, at.columns, panels);
        } else {
            for (int64_t q = 0; q < depth; ++q)
                narrow_block(adapter + q % term.r * n + at.j, n, 1, at.columns, rows + q * tile_columns, 0);
            pack_pairs(rows, tile_columns, depth, at.columns, panels);
        }
        for (int64_t i = 0; i < at.rows; i += TILED_STRIP) {
            const int64_t height = least(TILED_STRIP, at.rows - i);
            split_rows(low + i * term.ldlow, term.ldlow, height, term.r, factor, rows, ld);
            multiply_strip<false>(height, at.columns, padded, rows, ld, panels, padded, c + i * ldc, ldc);
        }
        drop_low_rank(term, at, c, ldc);
    }

    void add_base(const Term& term, const Tile& at, float* c, int64_t ldc, bf16* panels, bf16* strip) const {
        const bf16* weight = static_cast<const bf16*>(term.weight);
        const bf16* left = static_cast<const bf16*>(term.left) + at.i * term.ldl;
        for (int64_t k0 = 0; k0 < term.depth; k0 += TILED_DEPTH) {
            const int64_t depth = least(TILED_DEPTH, term.depth - k0);
            if (transposed) {
                pack_pairs_across(weight + at.j * term.ldw + k0, term.ldw, depth, at.columns, panels);
            } else {
                pack_pairs(weight + k0 * term.ldw + at.j, term.ldw, depth, at.columns, panels);
            }
            multiply_tiled(at.rows, at.columns, depth, left + k0, term.ldl, panels, c, ldc, strip, NO_DROPOUT, 0, 0);
        }
    }

    void tile(int64_t index, float* c) const {
        const Tile at = tile_at(index);
        float* spare = c + tile_size();
        bf16* panels = reinterpret_cast<bf16*>(spare + (any_apart(terms, count) ? tile_size() : 0));
        bf16* rows = panels + panels_size();
        sum_terms(
            at, c, tile_columns, spare,
            [&](const Term& term, float* to, int64_t ld) { add_low_rank(term, at, to, ld, panels, rows); },
            [&](const Term& term) { add_base(term, at, c, tile_columns, panels, rows); });
        finish(at, c, tile_columns, false);
    }

    void run(int64_t threads, float* scratch) const {
        const int64_t all = tiles(), size = scratch_per_task(), tasks = least(threads, all);
        run_tasks(tasks, [&](int64_t task) {
            const Tiles configured;
            const Range range = share(all, 1, tasks, task);
            for (int64_t index = range.begin; index < range.end; ++index) tile(index, scratch + task * size);
        });
    }
};

// h (m, r) = (x * D) Aᵀ: A packed once, then strips of tokens; dropout's 1 / (1 - p) comes last.
struct TiledShrink {
    int64_t m, k, r;
    const bf16* x;
    int64_t ldx;
    const float* lora_a;
    Dropout dropout;
    float* h;

    int64_t padded() const { return round_up(r, TILED_STRIP); }
    int64_t blocks() const { return ceil_div(k, TILED_DEPTH); }
    // In bf16: panels of A, and for each task sums, of floats, and a strip; A's rows are in the panels' order first.
    int64_t packed() const { return blocks() * TILED_DEPTH * padded(); }
    int64_t per_task() const { return TILED_STRIP * padded() * 2 + most_of(strip_size(TILED_DEPTH), r * TILED_DEPTH); }
    static int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }
    int64_t scratch(int64_t threads) const { return (packed() + threads * per_task()) / 2; }

    void pack(int64_t block, bf16* panels, bf16* rows) const {
        const int64_t k0 = block * TILED_DEPTH, depth = least(TILED_DEPTH, k - k0);
        narrow_block(lora_a + k0, k, r, depth, rows, TILED_DEPTH);
        pack_pairs_across(rows, TILED_DEPTH, depth, r, panels + k0 * padded());
    }

    void strip(int64_t i, int64_t rows, const bf16* panels, float* c, bf16* spare) const {
        fill(c, TILED_STRIP * padded(), 0.0f);
        for (int64_t k0 = 0; k0 < k; k0 += TILED_DEPTH) {
            multiply_tiled(rows, r, least(TILED_DEPTH, k - k0), x + i * ldx + k0, ldx, panels + k0 * padded(), c,
                           padded(), spare, dropout, i, k0);
        }
        for (int64_t at = 0; dropout.active && at < rows * padded(); ++at) c[at] *= static_cast<float>(dropout.scale);
        narrow_block(c, padded(), rows, r, h + i * r, r);
    }

    void run(int64_t threads, float* scratch) const {
        bf16* panels = reinterpret_cast<bf16*>(scratch);
        const auto own = [&](int64_t task) { return panels + packed() + task * per_task(); };
        const int64_t packers = least(threads, blocks());
        run_tasks(packers, [&](int64_t task) {
            const Range range = share(blocks(), 1, packers, task);
            for (int64_t block = range.begin; block < range.end; ++block)
                pack(block, panels, own(task) + TILED_STRIP * padded() * 2);
        });
        const int64_t tasks = least(threads, ceil_div(m, TILED_STRIP));
        run_tasks(tasks, [&](int64_t task) {
            const Tiles configured;
            const Range range = share(m, TILED_STRIP, tasks, task);
            for (int64_t i = range.begin; i < range.end; i += TILED_STRIP) {
                strip(i, least(TILED_STRIP, range.end - i), panels, reinterpret_cast<float*>(own(task)),
                      own(task) + TILED_STRIP * padded() * 2);
            }
        });
    }
};

// TokenSums in tiles. What is summed over tokens is (r, n) here, rightᵀ left, so that left, the large one, needs pairs
// of rows interleaved and no turning.
struct TiledTokenSums {
    static constexpr int64_t TOKENS = 128, COLUMNS = TILED_DEPTH, CHUNK = 2048, RUN = 16;

    int64_t m, n, r;
    const bf16* left;
    int64_t ldl;
    Dropout dropout;
    float factor;
    const float* right;  // (m, r)
    int64_t ldr;
    const float* adapter;         // read where lower is due
    float *sums, *lower, *total;  // null: not due
    bool transposed;

    int64_t padded() const { return round_up(r, TILED_STRIP); }
    int64_t tokens_padded() const { return padded_depth(m); }
    int64_t tasks(int64_t threads) const { return n == 0 ? 1 : least(threads, ceil_div(n, TILED_STRIP)); }
    int64_t widest(int64_t tasks) const { return ceil_div(ceil_div(n, TILED_STRIP), tasks) * TILED_STRIP; }

    struct Parts {  // of a task
        float *lower, *sums, *turned;
        double* total;  // in fp64: one chain of sums over all tokens
        bf16 *adapter, *panels, *block, *strip;
    };
    // Sizes in floats, in the order of Parts.
    int64_t lower_size() const { return lower == nullptr ? 0 : round_up(least(CHUNK, m), TILED_STRIP) * padded(); }
    int64_t block_size() const {  // in bf16; an adapter's rows lie there too
        const int64_t rows = COLUMNS * padded(), tokens = TOKENS * COLUMNS;
        return rows > tokens ? rows : tokens;
    }
    int64_t per_task(int64_t tasks) const {
        const int64_t width = widest(tasks);
        const int64_t words =
            round_up(width, COLUMNS) * padded() + TOKENS * COLUMNS + block_size() + strip_size(COLUMNS);
        return lower_size() + padded() * (width + TOKENS) + 2 * width + words / 2;
    }
    int64_t shared() const { return sums == nullptr ? 0 : GRADIENT_PARTS * padded() * tokens_padded() / 2; }
    int64_t scratch(int64_t threads) const { return tasks(threads) * per_task(tasks(threads)) + shared(); }

    Parts parts(float* scratch, int64_t count) const {
        const int64_t width = widest(count);
        float* own_sums = scratch + lower_size();
        float* turned = own_sums + padded() * width;
        float* own_total = turned + padded() * TOKENS;
        bf16* panels_of_adapter = reinterpret_cast<bf16*>(own_total + 2 * width);
        bf16* panels = panels_of_adapter + round_up(width, COLUMNS) * padded();
        bf16* block = panels + TOKENS * COLUMNS;
        return {scratch,           own_sums, turned, reinterpret_cast<double*>(own_total),
                panels_of_adapter, panels,   block,  block + block_size()};
    }

    // Part p of factor * rightᵀ, (r, m) with zeros after it, lies at split_right + p * padded() * tokens_padded().
    void split_tokens(const Range& tokens, float* turned, bf16* split_right) const {
        const int64_t count = tokens.end - tokens.begin, distance = padded() * tokens_padded();
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t q = 0; q < r; ++q) turned[q * TOKENS + i] = right[(tokens.begin + i) * ldr + q];
        }
        for (int64_t q = 0; q < r; ++q) {
            bf16* row = split_right + q * tokens_padded();
            split<GRADIENT_PARTS>(turned + q * TOKENS, count, factor, row + tokens.begin, distance);
            for (int64_t part = 0; tokens.end == m && part < GRADIENT_PARTS; ++part)
                fill(row + part * distance + m, tokens_padded() - m, bf16{0});
        }
    }

    // Starts the sums of columns [range.begin, range.end).
    void start(const Range& range, const Parts& part) const {
        const int64_t width = range.end - range.begin;
        for (int64_t j = 0; lower != nullptr && j < width; j += COLUMNS) {
            const int64_t columns = least(COLUMNS, width - j);
            narrow_block(adapter + (range.begin + j) * r, r, columns, r, part.block, r);
            pack_pairs(part.block, r, columns, r, part.adapter + j * padded());
        }
        if (sums != nullptr) fill(part.sums, width_of(range) * padded(), 0.0f);
        if (total != nullptr) fill(part.total, width, 0.0);
    }
    static int64_t width_of(const Range& range) { return round_up(range.end - range.begin, TILED_STRIP); }

    void add(const Range& range, const Range& tokens, const Parts& part, const bf16* split_right) const {
        const int64_t ld = padded();
        if (lower != nullptr) fill(part.lower, (tokens.end - tokens.begin) * ld, 0.0f);
        for (int64_t i = tokens.begin; i < tokens.end; i += TOKENS) {
            const int64_t rows = least(TOKENS, tokens.end - i);
            for (int64_t j = range.begin; j < range.end; j += COLUMNS) {
                const int64_t columns = least(COLUMNS, range.end - j);
                const bf16* from = left + i * ldl + j;
                if (lower != nullptr) {
                    multiply_tiled(rows, r, columns, from, ldl, part.adapter + (j - range.begin) * ld,
                                   part.lower + (i - tokens.begin) * ld, ld, part.strip, NO_DROPOUT, 0, 0);
                }
                if (sums != nullptr) add_sums(i, j, rows, columns, part, split_right, range);
                if (total != nullptr) add_rows(rows, columns, from, part.total + (j - range.begin));
            }
        }
    }

    void add_sums(int64_t i, int64_t j, int64_t rows, int64_t columns, const Parts& part, const bf16* split_right,
                  const Range& range) const {
        const bf16* from = left + i * ldl + j;
        if (dropout.active) {
            copy_padded(from, ldl, rows, columns, part.block, COLUMNS, dropout, i, j);
            pack_pairs(part.block, COLUMNS, rows, columns, part.panels);
        } else {
            pack_pairs(from, ldl, rows, columns, part.panels);
        }
        const int64_t ld = width_of(range), distance = padded() * tokens_padded();
        for (int64_t q = 0; q < r; q += TILED_STRIP) {
            for (int64_t p = 0; p < GRADIENT_PARTS; ++p) {
                const bf16* rows_of_part = split_right + p * distance + q * tokens_padded() + i;
                multiply_strip<false>(least(TILED_STRIP, r - q), columns, padded_depth(rows), rows_of_part,
                                      tokens_padded(), part.panels, padded_depth(rows),
                                      part.sums + q * ld + (j - range.begin), ld);
            }
        }
    }

    // total += the sums of columns: in fp32 over RUN tokens, and over the runs in fp64.
    void add_rows(int64_t rows, int64_t columns, const bf16* from, double* into) const {
        float run[COLUMNS];
        for (int64_t i0 = 0; i0 < rows; i0 += RUN) {
            fill(run, columns, 0.0f);
            for (int64_t i = i0; i < least(i0 + RUN, rows); ++i) {
                for (int64_t j = 0; j < columns; ++j) run[j] += widen(from[i * ldl + j]);
            }
            for (int64_t j = 0; j < columns; ++j) into[j] += static_cast<double>(run[j]);
        }
    }

    void finish(const Range& range, const Parts& part) const {
        const int64_t width = range.end - range.begin, ld = width_of(range);
        const float scale = dropout.active ? static_cast<float>(dropout.scale) : 1.0f;
        for (int64_t j = 0; total != nullptr && j < width; ++j)
            total[range.begin + j] = static_cast<float>(part.total[j]);
        for (int64_t q = 0; sums != nullptr && q < r; ++q) {
            const float* row = part.sums + q * ld;
            const int64_t step = transposed ? 1 : r;
            float* out = transposed ? sums + q * n + range.begin : sums + range.begin * r + q;
            for (int64_t j = 0; j < width; ++j) out[j * step] = row[j] * scale;
        }
    }

    void run(int64_t threads, float* scratch) const {
        const int64_t count = tasks(threads), size = per_task(count), blocks = ceil_div(m, TOKENS);
        bf16* split_right = reinterpret_cast<bf16*>(scratch + count * size);
        const int64_t splitters = sums == nullptr ? 0 : least(count, blocks);
        run_tasks(splitters, [&](int64_t index) {
            const Range range = share(m, TOKENS, splitters, index);
            for (int64_t i = range.begin; i < range.end; i += TOKENS)
                split_tokens({i, least(i + TOKENS, range.end)}, parts(scratch + index * size, count).turned,
                             split_right);
        });
        for (int64_t i = 0; i < m; i += CHUNK) {
            const Range tokens = {i, least(m, i + CHUNK)};
            run_tasks(count, [&](int64_t index) {
                const Tiles configured;
                const Range range = share(n, TILED_STRIP, count, index);
                const Parts part = parts(scratch + index * size, count);
                if (i == 0) start(range, part);
                add(range, tokens, part, split_right);
                if (tokens.end == m) finish(range, part);
            });
            if (lower != nullptr)
                add_up(threads, tokens.end - i, r, scratch, count, size, padded(), factor, lower + i * r);
        }
    }
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
#endif
