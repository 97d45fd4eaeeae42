// The building blocks: one outer-product micro-kernel on packed panels, one dot-product micro-kernel on rows, and the
// packing between storage and accumulation type. A panel is PANEL columns wide: element (k, n) lies at
// panel[n / PANEL][k][n % PANEL], zero where n is beyond the matrix.
#pragma once

#include "dropout.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

// Registers: ROWS x PANEL_VECTORS accumulators, PANEL_VECTORS of the panel, one broadcast.
#if LORA_VECTOR_BYTES == 64
constexpr int ROWS = 12, PANEL_VECTORS = 2;
#else
constexpr int ROWS = 6, PANEL_VECTORS = 2;
#endif
template <class T>
constexpr int64_t PANEL = PANEL_VECTORS * lanes<T>;

// Tasks and tiles begin at multiples of this: of a panel, and of what a word of dropout's mask covers.
constexpr int64_t UNIT = DROPOUT_WORD;
static_assert(UNIT % PANEL<float> == 0 && UNIT % PANEL<double> == 0, "a word's columns are whole panels");

LORA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int least_int(int a, int b) { return a < b ? a : b; }

// c (MR, VECTORS) += a (MR, depth) panel (depth, VECTORS), VECTORS vectors of columns, where a(i, k) = ALONG_K ?
// a[i * lda + k] : a[k * lda + i].
template <class T, int MR, int VECTORS, bool ALONG_K>
LORA_INLINE void multiply_rows(int64_t depth, const T* a, int64_t lda, const T* panel, T* c, int64_t ldc) {
    constexpr int VL = lanes<T>;
    Vector<T> acc[MR][VECTORS] = {};  // from zero: a chain of sums is no longer than a block is deep
    for (int64_t k = 0; k < depth; ++k) {
        Vector<T> b[VECTORS];
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) b[j] = load(panel + k * PANEL<T> + j * VL);
#pragma GCC unroll 12
        for (int i = 0; i < MR; ++i) {
            const T left = ALONG_K ? a[i * lda + k] : a[k * lda + i];
#pragma GCC unroll 2
            for (int j = 0; j < VECTORS; ++j) acc[i][j] += left * b[j];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) {
            T* out = c + i * ldc + j * VL;
            store(load(out) + acc[i][j], out);
        }
    }
}

// The same for any number of rows.
template <class T, int VECTORS, bool ALONG_K>
static void multiply_panel(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* panel, T* c, int64_t ldc) {
    for (int64_t i = 0; i < rows;) {
        const T* left = ALONG_K ? a + i * lda : a + i;
        T* out = c + i * ldc;
        const int64_t rest = rows - i;
        if (rest >= ROWS) {
            multiply_rows<T, ROWS, VECTORS, ALONG_K>(depth, left, lda, panel, out, ldc), i += ROWS;
        } else if (ROWS > 8 && rest >= 8) {
            multiply_rows<T, least_int(8, ROWS), VECTORS, ALONG_K>(depth, left, lda, panel, out, ldc), i += 8;
        } else if (rest >= 4) {
            multiply_rows<T, 4, VECTORS, ALONG_K>(depth, left, lda, panel, out, ldc), i += 4;
        } else if (rest >= 2) {
            multiply_rows<T, 2, VECTORS, ALONG_K>(depth, left, lda, panel, out, ldc), i += 2;
        } else {
            multiply_rows<T, 1, VECTORS, ALONG_K>(depth, left, lda, panel, out, ldc), i += 1;
        }
    }
}

// c (rows, columns) += a (rows, depth) b (depth, columns); b packed in panels, c padded to whole panels. A last panel
// that one vector covers, as a thin product of 16 columns has it in AVX-512, takes half the work.
template <class T, bool ALONG_K>
static void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t lda, const T* panels, T* c,
                     int64_t ldc) {
    for (int64_t n = 0; n < columns; n += PANEL<T>) {
        if (columns - n <= lanes<T>) {
            multiply_panel<T, 1, ALONG_K>(rows, depth, a, lda, panels + n * depth, c + n, ldc);
        } else {
            multiply_panel<T, PANEL_VECTORS, ALONG_K>(rows, depth, a, lda, panels + n * depth, c + n, ldc);
        }
    }
}

// out (rows, columns), row distance ldo: source's block, widened.
template <class T, class E>
static void widen_block(const E* source, int64_t lds, int64_t rows, int64_t columns, T* out, int64_t ldo) {
    constexpr int VL = lanes<T>;
    for (int64_t i = 0; i < rows; ++i) {
        const E* from = source + i * lds;
        T* to = out + i * ldo;
        int64_t j = 0;
        for (; j + VL <= columns; j += VL) store(load(from + j), to + j);
        for (; j < columns; ++j) to[j] = widen(from[j]);
    }
}

// The same of x * D, where there is dropout; (row, column) is the block's place in x.
template <class T, class E>
static void widen_block(const E* source, int64_t lds, int64_t rows, int64_t columns, T* out, int64_t ldo,
                        const Dropout& dropout, int64_t row, int64_t column) {
    if (dropout.active) return drop_block(source, lds, rows, columns, out, ldo, dropout, row, column);
    widen_block(source, lds, rows, columns, out, ldo);
}

// Panels of source (depth, columns), row distance lds; times factor.
template <class T, class E>
static void pack_rows(const E* source, int64_t lds, int64_t depth, int64_t columns, T factor, T* panels) {
    constexpr int VL = lanes<T>;
    for (int64_t n = 0; n < columns; n += PANEL<T>, panels += depth * PANEL<T>) {
        const int64_t width = least(PANEL<T>, columns - n);
        for (int64_t k = 0; k < depth; ++k) {
            const E* from = source + k * lds + n;
            T* to = panels + k * PANEL<T>;
            if (width == PANEL<T>) {
#pragma GCC unroll 2
                for (int j = 0; j < PANEL_VECTORS; ++j) store(load(from + j * VL) * factor, to + j * VL);
            } else {
                for (int64_t j = 0; j < PANEL<T>; ++j) to[j] = j < width ? widen(from[j]) * factor : T(0);
            }
        }
    }
}

// A square of lanes x lanes elements, transposed: log2(lanes) rounds of pairwise interleaving.
template <class T>
LORA_INLINE void transpose_square(Vector<T>* rows) {
    constexpr int VL = lanes<T>;
#pragma GCC unroll 4
    for (int half = VL / 2; half >= 1; half /= 2) {
        Vector<T> turned[VL];
#pragma GCC unroll 16
        for (int i = 0; i < VL / 2; ++i) {
            turned[2 * i] = interleave<0>(rows[i], rows[i + VL / 2]);
            turned[2 * i + 1] = interleave<1>(rows[i], rows[i + VL / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) rows[i] = turned[i];
    }
}

// Panels of sourceᵀ, where source is (columns, depth) with row distance lds; times factor.
template <class T, class E>
static void pack_columns(const E* source, int64_t lds, int64_t depth, int64_t columns, T factor, T* panels) {
    constexpr int VL = lanes<T>;
    for (int64_t n = 0; n < columns; n += PANEL<T>, panels += depth * PANEL<T>) {
        for (int64_t part = 0; part < PANEL<T>; part += VL) {
            const int64_t width = least(VL, columns - n - part);
            const E* from = source + (n + part) * lds;
            T* to = panels + part;
            int64_t k = 0;
            if (width == VL) {
                for (; k + VL <= depth; k += VL) {
                    Vector<T> square[VL];
#pragma GCC unroll 16
                    for (int i = 0; i < VL; ++i) square[i] = load(from + i * lds + k) * factor;
                    transpose_square<T>(square);
#pragma GCC unroll 16
                    for (int i = 0; i < VL; ++i) store(square[i], to + (k + i) * PANEL<T>);
                }
            }
            for (; k < depth; ++k) {
                for (int64_t i = 0; i < VL; ++i)
                    to[k * PANEL<T> + i] = i < width ? widen(from[i * lds + k]) * factor : T(0);
            }
        }
    }
}

// out (rows, columns) of E from c; one rounding.
template <class T, class E>
static void narrow_block(const T* c, int64_t ldc, int64_t rows, int64_t columns, E* out, int64_t ldo) {
    constexpr int VL = lanes<T>;
    for (int64_t i = 0; i < rows; ++i) {
        int64_t j = 0;
        for (; j + VL <= columns; j += VL) store(load(c + i * ldc + j), out + i * ldo + j);
        for (; j < columns; ++j) narrow(c[i * ldc + j], out + i * ldo + j);
    }
}

// out (rows, columns) of E = gain * c + bias, gain and bias (columns); c is of S, T or E, and may be out. One rounding.
template <class T, class S, class E>
static void scale_block(const S* c, int64_t ldc, int64_t rows, int64_t columns, const T* gain, const T* bias, E* out,
                        int64_t ldo) {
    constexpr int VL = lanes<T>;
    for (int64_t i = 0; i < rows; ++i) {
        const S* from = c + i * ldc;
        E* to = out + i * ldo;
        int64_t j = 0;
        for (; j + VL <= columns; j += VL) {
            const Vector<T> offset = bias == nullptr ? Vector<T>{} : load(bias + j);
            store(load(from + j) * load(gain + j) + offset, to + j);
        }
        for (; j < columns; ++j) narrow(widen(from[j]) * gain[j] + (bias == nullptr ? T(0) : bias[j]), to + j);
    }
}

// Σ p², four chains of sums.
template <class T>
static T sum_of_squares(const T* p, int64_t count) {
    constexpr int VL = lanes<T>, CHAINS = 4;
    Vector<T> sums[CHAINS] = {};
    int64_t j = 0;
    for (; j + CHAINS * VL <= count; j += CHAINS * VL) {
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; ++chain) {
            const Vector<T> value = load(p + j + chain * VL);
            sums[chain] += value * value;
        }
    }
    T rest = 0;
    for (; j < count; ++j) rest += p[j] * p[j];
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

template <class T>
LORA_INLINE void add_to(T* sums, const T* values, int64_t count) {
    for (int64_t j = 0; j < count; ++j) sums[j] += values[j];
}

template <class T>
LORA_INLINE void fill(T* out, int64_t count, T value) {
    for (int64_t i = 0; i < count; ++i) out[i] = value;
}

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
