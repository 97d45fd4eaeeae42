// The building blocks of products in AMX's tiles: packing, and c += left right.
//
// left is bf16 and row-major: its tiles are read where they lie. right is packed: for each TILE_SIDE columns its pairs
// of rows, (k, n) and (k + 1, n) beside each other, `depth` of them, so that a tile lies in one piece. Both end in
// zeros where a depth is no multiple of TILE_DEPTH; c is padded to whole tiles, and what stands there is of no account.
#pragma once

#include "pairs.h"
#include "tiles.h"

#if LORA_TILES
namespace lora_kernels {
namespace LORA_CAPABILITY {

constexpr int64_t TILED_STRIP = 2 * TILE_SIDE;    // rows and columns of c in tiles at once
constexpr int64_t TILED_DEPTH = 512;              // of a packed block: a strip of it stays in the first-level cache
constexpr int64_t STRIP_GAP = TILE_DEPTH;         // between a strip's rows: a line more than a power of two
constexpr int64_t FEW_PANELS = 4;                 // of TILED_STRIP columns: a copy of left costs what they would save
constexpr int64_t WORDS = LORA_VECTOR_BYTES / 4;  // pairs of bf16 in a vector

LORA_INLINE int64_t padded_depth(int64_t depth) { return round_up(depth, TILE_DEPTH); }
LORA_INLINE int64_t strip_size(int64_t depth) { return TILED_STRIP * (padded_depth(depth) + STRIP_GAP); }

// c (HEIGHT, WIDTH tiles) += left panels, for `depth` of the panels' panel_depth. ONCE: left is read from memory, and
// no more soon: it is asked for ahead.
template <int HEIGHT, int WIDTH, bool ONCE>
LORA_INLINE void multiply_tiles(int64_t depth, const bf16* left, int64_t ldl, const bf16* panels, int64_t panel_depth,
                                float* c, int64_t ldc) {
    constexpr bool TALL = HEIGHT == 2, WIDE = WIDTH == 2;
    constexpr int64_t AHEAD = 8 * TILE_DEPTH;
    const int64_t row = ldl * 2, sums = ldc * 4;
    const bf16* lower = left + TILE_SIDE * ldl;
    const bf16* beside = panels + TILE_SIDE * panel_depth;
    tile_load<0>(c, sums);
    if (WIDE) tile_load<1>(c + TILE_SIDE, sums);
    if (TALL) tile_load<2>(c + TILE_SIDE * ldc, sums);
    if (TALL && WIDE) tile_load<3>(c + TILE_SIDE * ldc + TILE_SIDE, sums);
    for (int64_t k = 0; k < depth; k += TILE_DEPTH) {
        for (int64_t i = 0; ONCE && i < HEIGHT * TILE_SIDE; ++i) __builtin_prefetch(left + i * ldl + k + AHEAD, 0, 2);
        tile_load<6>(panels + k * TILE_SIDE, TILE_BYTES);
        if (ONCE) tile_load_once<4>(left + k, row);
        if (!ONCE) tile_load<4>(left + k, row);
        tile_multiply<0, 4, 6>();
        if (WIDE) tile_load<7>(beside + k * TILE_SIDE, TILE_BYTES);
        if (WIDE) tile_multiply<1, 4, 7>();
        if (TALL && ONCE) tile_load_once<5>(lower + k, row);
        if (TALL && !ONCE) tile_load<5>(lower + k, row);
        if (TALL) tile_multiply<2, 5, 6>();
        if (TALL && WIDE) tile_multiply<3, 5, 7>();
    }
    tile_store<0>(c, sums);
    if (WIDE) tile_store<1>(c + TILE_SIDE, sums);
    if (TALL) tile_store<2>(c + TILE_SIDE * ldc, sums);
    if (TALL && WIDE) tile_store<3>(c + TILE_SIDE * ldc + TILE_SIDE, sums);
}

// c (rows, columns) += left (rows, depth) panels, rows <= TILED_STRIP; left is readable, and depth padded, to whole
// tiles.
template <bool ONCE>
static void multiply_strip(int64_t rows, int64_t columns, int64_t depth, const bf16* left, int64_t ldl,
                           const bf16* panels, int64_t panel_depth, float* c, int64_t ldc) {
    const bool tall = rows > TILE_SIDE;
    for (int64_t n = 0; n < columns; n += TILED_STRIP) {
        const bf16* panel = panels + n * panel_depth;
        const bool wide = columns - n > TILE_SIDE;
        if (tall && wide) multiply_tiles<2, 2, ONCE>(depth, left, ldl, panel, panel_depth, c + n, ldc);
        if (tall && !wide) multiply_tiles<2, 1, ONCE>(depth, left, ldl, panel, panel_depth, c + n, ldc);
        if (!tall && wide) multiply_tiles<1, 2, ONCE>(depth, left, ldl, panel, panel_depth, c + n, ldc);
        if (!tall && !wide) multiply_tiles<1, 1, ONCE>(depth, left, ldl, panel, panel_depth, c + n, ldc);
    }
}

// out (round_up(rows, TILE_SIDE), padded_depth(columns)), row distance ldo: source's block, dropped where it is to be,
// and zeros around it. (row, column) is its place in the matrix.
static void copy_padded(const bf16* source, int64_t lds, int64_t rows, int64_t columns, bf16* out, int64_t ldo,
                        const Dropout& dropout, int64_t row, int64_t column) {
    if (dropout.active) copy_kept(source, lds, rows, columns, out, ldo, dropout, row, column);
    for (int64_t i = 0; i < round_up(rows, TILE_SIDE); ++i) {
        const int64_t width = i < rows ? columns : 0;
        bf16* to = out + i * ldo;
        if (!dropout.active && i < rows)
            __builtin_memcpy(to, source + i * lds, static_cast<size_t>(width) * sizeof(bf16));
        __builtin_memset(to + width, 0, static_cast<size_t>(padded_depth(columns) - width) * sizeof(bf16));
    }
}

// c (rows, columns) += left (rows, depth) panels; `strip` holds strip_size(depth). Strips of left are copied where they
// are ragged or dropped from, and where many columns use them: rows a power of two apart share a few sets of the cache.
static void multiply_tiled(int64_t rows, int64_t columns, int64_t depth, const bf16* left, int64_t ldl,
                           const bf16* panels, float* c, int64_t ldc, bf16* strip, const Dropout& dropout, int64_t row,
                           int64_t column) {
    const int64_t padded = padded_depth(depth), lds = padded + STRIP_GAP;
    const bool may_stay = padded == depth && !dropout.active && columns <= FEW_PANELS * TILED_STRIP;
    for (int64_t i = 0; i < rows; i += TILED_STRIP) {
        const int64_t height = least(TILED_STRIP, rows - i);
        const bf16* from = left + i * ldl;
        if (may_stay && height % TILE_SIDE == 0) {
            multiply_strip<false>(height, columns, padded, from, ldl, panels, padded, c + i * ldc, ldc);
            continue;
        }
        copy_padded(from, ldl, height, depth, strip, lds, dropout, row + i, column);
        multiply_strip<false>(height, columns, padded, strip, lds, panels, padded, c + i * ldc, ldc);
    }
}

// Panels of source (depth, columns), row distance lds.
static void pack_pairs(const bf16* source, int64_t lds, int64_t depth, int64_t columns, bf16* panels) {
    for (int64_t n = 0; n < columns; n += TILE_SIDE, panels += padded_depth(depth) * TILE_SIDE) {
        for (int64_t k = 0; k < padded_depth(depth); k += 2) {
            for (int64_t part = 0; part < TILE_SIDE; part += WORDS) {
                const bf16* from = source + k * lds + n + part;
                const int64_t width = columns - n - part;
                const WordVector even = k < depth ? (WordVector)load_some(from, width) : WordVector{};
                const WordVector odd = k + 1 < depth ? (WordVector)load_some(from + lds, width) : WordVector{};
                write(panels + k * TILE_SIDE + 2 * part, odd | even >> 16);
            }
        }
    }
}

LORA_INLINE FloatVector read_some(const bf16* p, int64_t count) {  // pairs as they lie; zeros beyond count
    if (count >= 2 * WORDS) return read<FloatVector>(p);
    bf16 padded[2 * WORDS] = {};
    if (count > 0) __builtin_memcpy(padded, p, static_cast<size_t>(count) * sizeof(bf16));
    return read<FloatVector>(padded);
}

// Panels of sourceᵀ, where source is (columns, depth) with row distance lds: pairs stay together.
static void pack_pairs_across(const bf16* source, int64_t lds, int64_t depth, int64_t columns, bf16* panels) {
    for (int64_t n = 0; n < columns; n += TILE_SIDE, panels += padded_depth(depth) * TILE_SIDE) {
        for (int64_t part = 0; part < TILE_SIDE; part += WORDS) {
            const bf16* from = source + (n + part) * lds;
            const int64_t width = columns - n - part;
            for (int64_t k = 0; k < padded_depth(depth); k += 2 * WORDS) {
                FloatVector square[WORDS];
#pragma GCC unroll 16
                for (int i = 0; i < WORDS; ++i)
                    square[i] = i < width ? read_some(from + i * lds + k, depth - k) : FloatVector{};
                transpose_square<float>(square);
#pragma GCC unroll 16
                for (int i = 0; i < WORDS; ++i) write(panels + (k + 2 * i) * TILE_SIDE + 2 * part, square[i]);
            }
        }
    }
}

// The first bf16 of value's, cut off: what is left, exactly, stays in value. Nothing is left of NaN and infinities.
LORA_INLINE WordVector cut_part(FloatVector& value) {
    const WordVector bits = (WordVector)value;
    const WordVector finite = (WordVector)((bits & 0x7F800000u) != 0x7F800000u);
    const WordVector nan = (WordVector)((bits & 0x7FFFFFFFu) > 0x7F800000u);
    const WordVector part = (bits & 0xFFFF0000u) | (nan & 0x00400000u);
    value = (FloatVector)((WordVector)(value - (FloatVector)part) & finite);
    return part >> 16;
}

// factor * values as a sum of PARTS bf16, part p at out + p * distance. An fp32 number is three of them exactly, but
// for what is below the least normal number; two are within 2^-16 of it.
template <int PARTS>
static void split(const float* values, int64_t count, float factor, bf16* out, int64_t distance) {
    for (int64_t i = 0; i < count; i += WORDS) {
        const int64_t width = least(WORDS, count - i);
        FloatVector value = (width == WORDS ? load(values + i) : load_part(values + i, width)) * factor;
        for (int part = 0; part < PARTS; ++part) {
            bf16 words[WORDS];
            if (part + 1 < PARTS) {
                write(words, __builtin_convertvector(cut_part(value), HalfWidthWords));
            } else {
                store(value, words);
            }
            __builtin_memcpy(out + part * distance + i, words, static_cast<size_t>(width) * sizeof(bf16));
        }
    }
}

// h and dh as an operand of y and dx, which are rounded to bf16: two parts, side by side along the depth, against the
// adapter twice. As an operand of db and da, which may be fp32, they take three.
constexpr int LOW_PARTS = 2, GRADIENT_PARTS = 3;

// out (round_up(rows, TILE_SIDE), padded_depth(LOW_PARTS r)): rows of factor * low in parts.
static void split_rows(const float* low, int64_t ldlow, int64_t rows, int64_t r, float factor, bf16* out, int64_t ldo) {
    for (int64_t i = 0; i < round_up(rows, TILE_SIDE); ++i) {
        const int64_t width = i < rows ? LOW_PARTS * r : 0;
        if (i < rows) split<LOW_PARTS>(low + i * ldlow, r, factor, out + i * ldo, r);
        __builtin_memset(out + i * ldo + width, 0,
                         static_cast<size_t>(padded_depth(LOW_PARTS * r) - width) * sizeof(bf16));
    }
}

// out (round_up(rows, TILE_SIDE), padded_depth(LOW_PARTS r)): rows of an adapter (rows, r), which bf16 holds exactly,
// LOW_PARTS times.
static void repeat_rows(const float* adapter, int64_t rows, int64_t r, bf16* out, int64_t ldo) {
    for (int64_t i = 0; i < round_up(rows, TILE_SIDE); ++i) {
        const int64_t width = i < rows ? LOW_PARTS * r : 0;
        for (int64_t part = 0; part * r < width; ++part)
            narrow_block(adapter + i * r, r, 1, r, out + i * ldo + part * r, r);
        __builtin_memset(out + i * ldo + width, 0,
                         static_cast<size_t>(padded_depth(LOW_PARTS * r) - width) * sizeof(bf16));
    }
}

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
#endif
