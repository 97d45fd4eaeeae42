// Many tokens: y, dx and h as blocked products on packed panels, db, dh and da as reductions over tokens.
//
// Every product's work is cut into tasks by sizes and the number of threads alone, and sums run in a fixed order, so
// the same call with the same number of threads gives the same bits.
#pragma once

#include "blocks.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

constexpr int64_t DEPTH = 256;         // of a packed block: 256 x PANEL floats of it fit the first-level cache
constexpr int64_t TILE_ROWS = 512;     // tokens that share one packing of W
constexpr int64_t LOW_RANK_ROWS = 96;  // tokens in a tile without the base: it is to stay in the second-level cache
constexpr int64_t TILE_COLUMNS = 256;  // of y or dx in a tile
constexpr int64_t STRIP = 48;          // rows that are widened at once (a multiple of ROWS)
constexpr int64_t STRIP_STRIDE = DEPTH + 16;

constexpr Dropout NO_DROPOUT = {false, 0, 0, 0, 1.0};

// Runs a callable of (task) through `parallel`.
template <class F>
static void run_tasks(int64_t tasks, const F& body) {
    parallel(
        tasks, [](void* context, int64_t task) { (*static_cast<const F*>(context))(task); }, const_cast<F*>(&body));
}

struct Range {
    int64_t begin, end;
};
// Part `task` of `count` things cut into `tasks` runs of whole `unit`s.
LORA_INLINE Range share(int64_t count, int64_t unit, int64_t tasks, int64_t task) {
    const int64_t units = ceil_div(count, unit);
    return {least(count, units * task / tasks * unit), least(count, units * (task + 1) / tasks * unit)};
}

// c (rows, columns) += left (rows, depth) panels, left widened strip by strip. Strips are copied even where left is T,
// unless few columns use them or rows are short: rows a large power of two apart share a few sets of the cache.
template <class T, class E>
static void multiply_widened(int64_t rows, int64_t columns, int64_t depth, const E* left, int64_t ldl, const T* panels,
                             T* c, int64_t ldc, T* strip, const Dropout& dropout, int64_t row, int64_t column) {
    const bool in_place = sizeof(T) == sizeof(E) && !dropout.active && (columns <= 4 * PANEL<T> || ldl <= DEPTH / 2);
    for (int64_t i = 0; i < rows; i += STRIP) {
        const int64_t height = least(STRIP, rows - i);
        if (in_place) {
            multiply<T, true>(height, columns, depth, reinterpret_cast<const T*>(left + i * ldl), ldl, panels,
                              c + i * ldc, ldc);
            continue;
        }
        widen_block(left + i * ldl, ldl, height, depth, strip, STRIP_STRIDE, dropout, row + i, column);
        multiply<T, true>(height, columns, depth, strip, STRIP_STRIDE, panels, c + i * ldc, ldc);
    }
}

// Whether a term's low-rank part needs sums of its own before it joins the others': dropout must act on it alone.
LORA_INLINE bool is_apart(const Term* terms, int64_t t) { return t > 0 && terms[t].dropout.active; }
LORA_INLINE bool any_apart(const Term* terms, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
        if (is_apart(terms, t)) return true;
    }
    return false;
}

// out (m, n) = gain * (Σ terms) + bias, each term D * (factor low adapter) + left right, where right is Wᵀ (transposed)
// or W. The low-rank parts come first, so that dropout can act on each of them alone.
template <class T, class E>
struct Product {
    int64_t m, n;
    const Term* terms;
    int64_t count;
    bool transposed;
    T factor;              // on the low-rank parts
    const T *bias, *gain;  // (n) or null
    E *linear, *out;       // (m, n), contiguous; linear, Σ terms, may be null

    int64_t tile_rows, tile_columns;

    struct Tile {
        int64_t i, j, rows, columns;
    };

    bool has_base() const {
        for (int64_t t = 0; t < count; ++t) {
            if (terms[t].weight != nullptr) return true;
        }
        return false;
    }

    // Tiles: enough of them for the threads, as large as that allows, with at least so many columns; of whole
    // `row_unit`s and `column_unit`s.
    void plan(int64_t threads, int64_t most_rows, int64_t most_columns, int64_t least_columns, int64_t row_unit,
              int64_t column_unit) {
        tile_rows = row_unit, tile_columns = column_unit;
        if (m == 0 || n == 0) return;
        tile_rows = least(most_rows, round_up(m, row_unit));
        tile_columns = least(most_columns, round_up(n, column_unit));
        while (tiles() < threads && tile_columns > least_columns && tile_columns > column_unit)
            tile_columns = round_up(tile_columns / 2, column_unit);
        while (tiles() < threads && tile_rows > 2 * row_unit) tile_rows = round_up(tile_rows / 2, row_unit);
        const int64_t row_tiles = ceil_div(m, tile_rows);
        tile_rows = round_up(ceil_div(m, row_tiles), row_unit);
    }
    void plan(int64_t threads) {
        plan(threads, has_base() ? TILE_ROWS : LOW_RANK_ROWS, TILE_COLUMNS, 4 * PANEL<T>, ROWS, UNIT);
    }
    int64_t tiles() const { return ceil_div(m, tile_rows) * ceil_div(n, tile_columns); }
    int64_t tile_size() const { return tile_rows * tile_columns; }
    int64_t deepest(int64_t depth) const {
        for (int64_t t = 0; t < count; ++t) depth = terms[t].r > depth ? terms[t].r : depth;
        return depth;
    }
    int64_t panels_size() const { return deepest(DEPTH) * tile_columns; }
    int64_t scratch_per_task() const {  // elements of T: c, spare, panels, strip
        return (any_apart(terms, count) ? 2 : 1) * tile_size() + panels_size() + STRIP * STRIP_STRIDE;
    }

    void start_row(T* c, int64_t j0, int64_t columns) const {  // a bias goes with products that have no dropout
        if (bias == nullptr || gain != nullptr) return fill(c, round_up(columns, PANEL<T>), T(0));
        for (int64_t j = 0; j < columns; ++j) c[j] = bias[j0 + j];
        for (int64_t j = columns; j < round_up(columns, PANEL<T>); ++j) c[j] = T(0);
    }

    void add_low_rank(const Term& term, const Tile& at, T* c, int64_t ldc, T* panels) const {
        const T* adapter = static_cast<const T*>(term.adapter);
        const T* low = static_cast<const T*>(term.low) + at.i * term.ldlow;
        if (transposed) {
            pack_columns(adapter + at.j * term.r, term.r, term.r, at.columns, factor, panels);
        } else {
            pack_rows(adapter + at.j, n, term.r, at.columns, factor, panels);
        }
        multiply<T, true>(at.rows, at.columns, term.r, low, term.ldlow, panels, c, ldc);
        drop_low_rank(term, at, c, ldc);
    }

    void add_base(const Term& term, const Tile& at, T* c, int64_t ldc, T* panels, T* strip) const {
        const E* weight = static_cast<const E*>(term.weight);
        const E* left = static_cast<const E*>(term.left) + at.i * term.ldl;
        for (int64_t k0 = 0; k0 < term.depth; k0 += DEPTH) {
            const int64_t depth = least(DEPTH, term.depth - k0);
            if (transposed) {
                pack_columns(weight + at.j * term.ldw + k0, term.ldw, depth, at.columns, T(1), panels);
            } else {
                pack_rows(weight + k0 * term.ldw + at.j, term.ldw, depth, at.columns, T(1), panels);
            }
            multiply_widened(at.rows, at.columns, depth, left + k0, term.ldl, panels, c, ldc, strip, NO_DROPOUT, 0, 0);
        }
    }

    void finish(const Tile& at, const T* c, int64_t ldc, bool direct) const {
        const int64_t start = at.i * n + at.j;
        if (gain == nullptr) {
            if (!direct) narrow_block(c, ldc, at.rows, at.columns, out + start, n);
            return;
        }
        if (linear != nullptr && !direct) narrow_block(c, ldc, at.rows, at.columns, linear + start, n);
        scale_block(c, ldc, at.rows, at.columns, gain + at.j, bias == nullptr ? nullptr : bias + at.j, out + start, n);
    }

    // c = Σ terms of a tile, by add_low(term, where, row distance) and add_base(term); spare is as large as c.
    template <class Low, class Base>
    void sum_terms(const Tile& at, T* c, int64_t ldc, T* spare, const Low& add_low, const Base& add_base) const {
        for (int64_t i = 0; i < at.rows; ++i) start_row(c + i * ldc, at.j, at.columns);
        for (int64_t t = 0; t < count; ++t) {
            if (!is_apart(terms, t)) {
                add_low(terms[t], c, ldc);
                continue;
            }
            fill(spare, at.rows * tile_columns, T(0));
            add_low(terms[t], spare, tile_columns);
            for (int64_t i = 0; i < at.rows; ++i) add_to(c + i * ldc, spare + i * tile_columns, at.columns);
        }
        for (int64_t t = 0; t < count; ++t) {
            if (terms[t].weight != nullptr) add_base(terms[t]);
        }
    }

    // Dropout of a term's low-rank part, the first that is in c.
    void drop_low_rank(const Term& term, const Tile& at, T* c, int64_t ldc) const {
        if (term.dropout.active) drop_block(c, ldc, at.rows, at.columns, c, ldc, term.dropout, at.i, at.j);
    }

    Tile tile_at(int64_t index) const {
        const int64_t column_tiles = ceil_div(n, tile_columns);
        const int64_t i = index / column_tiles * tile_rows, j = index % column_tiles * tile_columns;
        return {i, j, least(tile_rows, m - i), least(tile_columns, n - j)};
    }

    void tile(int64_t index, T* scratch) const {
        const Tile at = tile_at(index);
        const bool direct = sizeof(T) == sizeof(E) && at.columns % PANEL<T> == 0;  // sums where they are to stay
        T* c = direct ? reinterpret_cast<T*>((linear != nullptr ? linear : out) + at.i * n + at.j) : scratch;
        const int64_t ldc = direct ? n : tile_columns;
        T* spare = scratch + tile_size();
        T* panels = spare + (any_apart(terms, count) ? tile_size() : 0);
        T* strip = panels + panels_size();
        sum_terms(
            at, c, ldc, spare, [&](const Term& term, T* to, int64_t ld) { add_low_rank(term, at, to, ld, panels); },
            [&](const Term& term) { add_base(term, at, c, ldc, panels, strip); });
        finish(at, c, ldc, direct);
    }

    void run(int64_t threads, T* scratch) const {
        const int64_t all = tiles(), size = scratch_per_task();
        const int64_t tasks = least(threads, all);
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(all, 1, tasks, task);
            for (int64_t index = range.begin; index < range.end; ++index) tile(index, scratch + task * size);
        });
    }
};

// h (m, r) = (x * D) Aᵀ: A packed once, then strips of tokens.
template <class T, class E>
struct Shrink {
    int64_t m, k, r;
    const E* x;
    int64_t ldx;
    const T* lora_a;
    Dropout dropout;
    T* h;

    int64_t padded() const { return round_up(r, PANEL<T>); }
    int64_t packed() const { return round_up(k, DEPTH) * padded(); }
    int64_t scratch_per_task() const { return STRIP * padded() + STRIP * STRIP_STRIDE; }
    int64_t scratch(int64_t threads) const { return packed() + threads * scratch_per_task(); }

    void run(int64_t threads, T* scratch) const {
        const int64_t blocks = ceil_div(k, DEPTH), packers = least(threads, blocks);
        T* panels = scratch;
        run_tasks(packers, [&](int64_t task) {
            const Range range = share(blocks, 1, packers, task);
            for (int64_t block = range.begin; block < range.end; ++block) {
                const int64_t k0 = block * DEPTH;
                pack_columns(lora_a + k0, k, least(DEPTH, k - k0), r, T(1), panels + k0 * padded());
            }
        });
        const int64_t tasks = least(threads, ceil_div(m, ROWS));
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(m, ROWS, tasks, task);
            T* c = scratch + packed() + task * scratch_per_task();
            T* strip = c + STRIP * padded();
            for (int64_t i = range.begin; i < range.end; i += STRIP) {
                const int64_t rows = least(STRIP, range.end - i);
                fill(c, rows * padded(), T(0));
                for (int64_t k0 = 0; k0 < k; k0 += DEPTH) {
                    multiply_widened(rows, r, least(DEPTH, k - k0), x + i * ldx + k0, ldx, panels + k0 * padded(), c,
                                     padded(), strip, dropout, i, k0);
                }
                narrow_block(c, padded(), rows, r, h + i * r, r);
            }
        });
    }
};

// out (rows, columns) = factor * the sum of `count` matrices `distance` apart, row distance ld, in their order. It is
// made in the first of them.
template <class T>
static void add_up(int64_t threads, int64_t rows, int64_t columns, T* parts, int64_t count, int64_t distance,
                   int64_t ld, T factor, T* out) {
    constexpr int64_t ROWS_OF_TASK = 64;
    const int64_t tasks = least(threads, ceil_div(rows, ROWS_OF_TASK));
    run_tasks(tasks, [&](int64_t index) {
        const Range range = share(rows, 1, tasks, index);
        for (int64_t row = range.begin; row < range.end; ++row) {
            T* sum = parts + row * ld;
            for (int64_t other = 1; other < count; ++other) add_to(sum, parts + other * distance + row * ld, columns);
            for (int64_t j = 0; j < columns; ++j) out[row * columns + j] = sum[j] * factor;
        }
    });
}

// Sums over tokens of the rows of left (m, n), each element read once, block by block:
//   sums  (n, r) = factor (left * D)ᵀ right                 db = s dyᵀ h; da = dhᵀ (x * D), stored as (r, n)
//   lower (m, r) = factor left adapter, adapter (n, r)      dh = s dy B
//   total (n)    = Σ_m left                                 dbias
// Columns of left are cut among the tasks, so sums and total are whole in one task and do not depend on the number of
// threads; lower is summed over the tasks in their order.
template <class T, class E>
struct TokenSums {
    static constexpr int64_t TOKENS = 64, COLUMNS = DEPTH, STRIDE = STRIP_STRIDE, CHUNK = 2048;

    int64_t m, n, r;
    const E* left;
    int64_t ldl;
    Dropout dropout;
    T factor;
    const T* right;  // (m, r)
    int64_t ldr;
    const T* adapter;         // read where lower is due
    T *sums, *lower, *total;  // null: not due
    bool transposed;

    int64_t padded() const { return round_up(r, PANEL<T>); }
    int64_t tasks(int64_t threads) const { return n == 0 ? 1 : least(threads, ceil_div(n, UNIT)); }
    int64_t widest(int64_t tasks) const { return ceil_div(ceil_div(n, UNIT), tasks) * UNIT; }
    int64_t lower_size() const { return lower == nullptr ? 0 : least(CHUNK, m) * padded(); }
    int64_t scratch_per_task(int64_t tasks) const {  // lower, panels, sums, right, block, total
        return lower_size() + (2 * widest(tasks) + TOKENS) * padded() + TOKENS * STRIDE + 2 * widest(tasks);
    }
    int64_t scratch(int64_t threads) const { return tasks(threads) * scratch_per_task(tasks(threads)); }

    struct Parts {
        T *lower, *panels, *sums, *right, *block;
        double* total;  // in fp64: one chain of sums over all tokens
    };
    Parts parts(T* scratch, int64_t count) const {
        const int64_t ld = padded(), width = widest(count);
        T* panels = scratch + lower_size();
        T* block = panels + (2 * width + TOKENS) * ld;
        return {scratch,
                panels,
                panels + width * ld,
                panels + 2 * width * ld,
                block,
                reinterpret_cast<double*>(block + TOKENS * STRIDE)};
    }

    // Starts the sums of columns [range.begin, range.end).
    void start(const Range& range, const Parts& part) const {
        const int64_t width = range.end - range.begin;
        for (int64_t j = 0; lower != nullptr && j < width; j += COLUMNS) {
            pack_rows(adapter + (range.begin + j) * r, r, least(COLUMNS, width - j), r, factor,
                      part.panels + j * padded());
        }
        if (sums != nullptr) fill(part.sums, width * padded(), T(0));
        if (total != nullptr) fill(part.total, width, 0.0);
    }

    void add(const Range& range, const Range& tokens, const Parts& part) const {
        const int64_t ld = padded();
        if (lower != nullptr) fill(part.lower, (tokens.end - tokens.begin) * ld, T(0));
        for (int64_t i = tokens.begin; i < tokens.end; i += TOKENS) {
            const int64_t rows = least(TOKENS, tokens.end - i);
            if (sums != nullptr) pack_rows(right + i * ldr, ldr, rows, r, factor, part.right);
            for (int64_t j = range.begin; j < range.end; j += COLUMNS) {
                const int64_t columns = least(COLUMNS, range.end - j);
                const E* from = left + i * ldl + j;
                const T* a = part.block;
                int64_t lda = STRIDE;
                if (sizeof(T) == sizeof(E) && !dropout.active) {
                    a = reinterpret_cast<const T*>(from), lda = ldl;
                } else {
                    widen_block(from, ldl, rows, columns, part.block, STRIDE, dropout, i, j);
                }
                if (lower != nullptr) {
                    T* out = part.lower + (i - tokens.begin) * ld;
                    multiply<T, true>(rows, r, columns, a, lda, part.panels + (j - range.begin) * ld, out, ld);
                }
                if (sums != nullptr) {
                    multiply<T, false>(columns, r, rows, a, lda, part.right, part.sums + (j - range.begin) * ld, ld);
                }
                if (total != nullptr) add_rows(rows, columns, a, lda, part.total + (j - range.begin));
            }
        }
    }

    static void add_rows(int64_t rows, int64_t columns, const T* a, int64_t lda, double* total) {
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t column = 0; column < columns; ++column)
                total[column] += static_cast<double>(a[row * lda + column]);
        }
    }

    void finish(const Range& range, const Parts& part) const {
        const int64_t ld = padded(), width = range.end - range.begin;
        for (int64_t j = 0; total != nullptr && j < width; ++j) total[range.begin + j] = static_cast<T>(part.total[j]);
        if (sums == nullptr) return;
        if (!transposed) return narrow_block(part.sums, ld, width, r, sums + range.begin * r, r);
        for (int64_t i = 0; i < r; ++i) {
            for (int64_t j = 0; j < width; ++j) sums[i * n + range.begin + j] = part.sums[j * ld + i];
        }
    }

    void run(int64_t threads, T* scratch) const {
        const int64_t count = tasks(threads), size = scratch_per_task(count);
        for (int64_t i = 0; i < m; i += CHUNK) {
            const Range tokens = {i, least(m, i + CHUNK)};
            run_tasks(count, [&](int64_t index) {
                const Range range = share(n, UNIT, count, index);
                const Parts part = parts(scratch + index * size, count);
                if (i == 0) start(range, part);
                add(range, tokens, part);
                if (tokens.end == m) finish(range, part);
            });
            if (lower != nullptr)
                add_up(threads, tokens.end - i, r, scratch, count, size, padded(), T(1), lower + i * r);
        }
    }
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
