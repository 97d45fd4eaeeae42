// The kernels without products: stage two of every sum, the columns' sums, the mask.
#pragma once

#include "plan.h"
#include "stage.h"

namespace lora_kernels {
namespace cuda {

struct NoShared {};

struct ReduceArgs {
    const void* parts;
    int64_t count, elements;
    double scale;
    void* out;
    DType out_dtype;
};

// out[i] = scale Σ_slice parts[slice][i], the slices in order.
//
//   parts  (count, elements)  fp32 (fp64), contiguous
//   out    (elements,)        any dtype, contiguous; one rounding
//
// Grid: THREADS elements a block. Sums in fp32 (fp64); count flops an element; reads the parts once.
template <typename Sum>
struct Reduce {
    using Args = ReduceArgs;
    using Shared = NoShared;
    static constexpr bool TENSOR = false;
    static int64_t blocks(const Args& args) { return ceil_div(args.elements, THREADS); }

    template <class Warp>
    LORA_TEAM static void run(Warp& warp, Shared&, const Args& args, int64_t block) {
        warp.each([&](int lane) {
            const int64_t element = block * THREADS + warp.index() * WARP_LANES + lane;
            if (element >= args.elements) return;
            const Sum* parts = static_cast<const Sum*>(args.parts) + element;
            Sum sum = 0;
            for (int64_t slice = 0; slice < args.count; ++slice) sum += parts[slice * args.elements];
            store_as(args.out, args.out_dtype, element, static_cast<Sum>(args.scale) * sum);
        });
    }
};

struct ColumnSumArgs {
    Matrix dy;
    void* parts;
    Slices slices;
};

// parts[slice][n] = Σ over the slice of M of dy[m, n]: dbias, whose stage two is Reduce.
//
//   dy     (M, N)       T; unit column stride, any row stride
//   parts  (count, N)   fp32 (fp64), contiguous
//
// Grid: slice-major over (slices, THREADS columns). Sums in fp32 (fp64); M N additions; reads dy once.
template <typename T>
struct ColumnSum {
    using Args = ColumnSumArgs;
    using Shared = NoShared;
    using Sum = typename Number<T>::Sum;
    static constexpr bool TENSOR = false;
    static constexpr int MINIMUM_ROWS = 64;
    static int64_t tiles(int64_t columns) { return ceil_div(columns, THREADS); }
    static Slices slices(int64_t rows, int64_t columns) { return slices_of(rows, 1, tiles(columns), MINIMUM_ROWS); }
    static int64_t blocks(const Args& args) { return args.slices.count * tiles(args.dy.columns); }

    template <class Warp>
    LORA_TEAM static void run(Warp& warp, Shared&, const Args& args, int64_t block) {
        const int64_t tiles = ceil_div(args.dy.columns, THREADS), slice = block / tiles;
        const int64_t begin = slice_begin(args.slices, slice), end = slice_end(args.slices, slice, args.dy.rows);
        warp.each([&](int lane) {
            const int64_t column = block % tiles * THREADS + warp.index() * WARP_LANES + lane;
            if (column >= args.dy.columns) return;
            const T* dy = static_cast<const T*>(args.dy.data) + column;
            Sum sum = 0;
            for (int64_t row = begin; row < end; ++row) sum += widen(dy[row * args.dy.row_stride]);
            static_cast<Sum*>(args.parts)[slice * args.dy.columns + column] = sum;
        });
    }
};

struct MaskArgs {
    Dropout dropout;
    bool* keep;
    int64_t rows, columns;
};

// keep[m, k] = bit k % 32 of the mask's word.
//
//   seed  (2,)     int64
//   keep  (M, K)   bool, contiguous
//
// Grid: THREADS words of 32 elements a block, a row's words together. Integer arithmetic; writes M K bytes.
struct Mask {
    using Args = MaskArgs;
    using Shared = NoShared;
    static constexpr bool TENSOR = false;
    static int64_t blocks(const Args& args) {
        return ceil_div(args.rows * ceil_div(args.columns, DROPOUT_WORD), THREADS);
    }

    template <class Warp>
    LORA_TEAM static void run(Warp& warp, Shared&, const Args& args, int64_t block) {
        const int64_t across = ceil_div(args.columns, DROPOUT_WORD);
        warp.each([&](int lane) {
            const int64_t index = block * THREADS + warp.index() * WARP_LANES + lane;
            const int64_t row = index / across, word = index % across, column = word * DROPOUT_WORD;
            if (row >= args.rows) return;
            const uint32_t bits = keep_word(args.dropout, row, word);
            bool* keep = args.keep + row * args.columns + column;
            for (int j = 0; j < DROPOUT_WORD && column + j < args.columns; ++j) keep[j] = bits >> j & 1u;
        });
    }
};

}  // namespace cuda
}  // namespace lora_kernels
