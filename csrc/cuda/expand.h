// The low-rank expand: what the library's GEMM then accumulates the base product onto.
#pragma once

#include "plan.h"
#include "stage.h"

namespace lora_kernels {
namespace cuda {

struct ExpandArgs {
    Operand hidden;
    Operand factor;
    const void* bias;
    DType bias_dtype;
    int64_t bias_stride;
    Dropout dropout;
    void* out;
    double scale;
};

// out = keep * (scale hidden factorᵀ + bias). Forward: y0 = s h lora_bᵀ + bias, no seed. dx: dx0 = D * (dh lora_a),
// with factor = lora_aᵀ, scale = 1/(1-p), no bias.
//
//   hidden  (M, R)          fp32 (fp64), any strides; 16-bit T: as a high and a low part, so that it keeps its bits
//   factor  (C, R)          any dtype, any strides; rounded to T; over fp16 two bf16 parts, as hidden then has
//   bias    (C,) or null    any dtype, any stride; rounded to T
//   out     (M, C)          T; contiguous
//
// Grid: row-major over (tiles of ROWS rows, tiles of COLUMNS columns); a warp owns 16 rows. Sums in fp32 (fp64), one
// rounding; 2 M C R flops (twice that in 16 bits); writes out once, in units of 8 elements with their mask, reads the
// small factors from L2.
template <typename T>
struct Expand {
    using Args = ExpandArgs;
    using P = Product<T>;
    using Sum = typename Number<T>::Sum;
    using Factor = typename Number<T>::Factor;
    static constexpr bool TENSOR = Number<T>::SPLIT;
    static constexpr int ROWS = 16 * WARPS, COLUMNS = 256 / static_cast<int>(sizeof(T)), RANKS = 16;
    static constexpr int ACROSS = COLUMNS / PRODUCT_COLUMNS;

    struct Shared : LowFactor<T, COLUMNS, RANKS, 1> {
        Tile<Factor, ROWS, RANKS> high;
        Tile<Factor, Number<T>::SPLIT ? ROWS : 1, RANKS> low;
        Tile<Factor, COLUMNS, RANKS> factor;
        Tile<T, ROWS, COLUMNS> out;
        KeepWords<ROWS, COLUMNS> kept;
        Sum bias[COLUMNS];
    };

    static int64_t blocks(const Args& args) {
        return ceil_div(args.hidden.rows, ROWS) * ceil_div(args.factor.rows, COLUMNS);
    }

    template <class Warp>
    LORA_TEAM static void run(Warp& warp, Shared& shared, const Args& args, int64_t block) {
        const int64_t across_all = ceil_div(args.factor.rows, COLUMNS), ranks = args.factor.columns;
        const int64_t first_row = block / across_all * ROWS, first_column = block % across_all * COLUMNS;
        const int warp_row = warp.index() * PRODUCT_ROWS;
        typename Warp::template Lanes<Sums<T, ACROSS>> sums;
        clear(warp, sums);
        stage_bias(warp, shared, args, first_column);
        if (args.dropout.seed != nullptr) shared.kept.draw(warp, args.dropout, first_row, first_column);
        for (int64_t rank = 0; rank < ranks; rank += RANKS) {
            stage_hidden(warp, shared.high, shared.low, args.hidden, first_row, rank, ranks);
            stage_factor(warp, shared.factor, shared.low_factor(0), args.factor, first_column, rank, ranks);
            warp.barrier();
            LORA_UNROLL_STEPS for (int k = 0; k < RANKS; k += P::STEP) {
                typename Warp::template Lanes<typename P::A> high, low;
                typename Warp::template Lanes<typename P::B> column, low_column;
                P::load_a(warp, high, shared.high.at(warp_row, k), shared.high.WIDTH);
                if constexpr (Number<T>::SPLIT) P::load_a(warp, low, shared.low.at(warp_row, k), shared.low.WIDTH);
                LORA_UNROLL for (int at = 0; at < ACROSS; ++at) {
                    P::load_b(warp, column, shared.factor.at(at * PRODUCT_COLUMNS, k), shared.factor.WIDTH);
                    if constexpr (Number<T>::WIDE) {
                        P::load_b(warp, low_column, shared.low_factor(0)->at(at * PRODUCT_COLUMNS, k),
                                  shared.factor.WIDTH);
                        multiply_wide<T>(warp, sums, at, high, low, column, low_column);
                    } else {
                        P::multiply(warp, sums, at, high, column);
                        if constexpr (Number<T>::SPLIT) P::multiply(warp, sums, at, low, column);
                    }
                }
            }
            warp.barrier();
        }

        warp.each([&](int lane) {
            LORA_UNROLL for (int at = 0; at < ACROSS; ++at) {
                LORA_UNROLL for (int i = 0; i < 4; ++i) {
                    const int row = warp_row + accumulator_row(lane, i);
                    const int column = at * PRODUCT_COLUMNS + accumulator_column(lane, i);
                    const Sum value = static_cast<Sum>(args.scale) * sums[lane].tile[at].v[i] + shared.bias[column];
                    *shared.out.at(row, column) = narrowed<T>(value);
                }
            }
        });
        warp.barrier();
        write(warp, shared, args, first_row, first_column);
    }

    // The tile's part of bias, rounded to T; zero where there is none.
    template <class Warp>
    LORA_TEAM static void stage_bias(Warp& warp, Shared& shared, const Args& args, int64_t first_column) {
        warp.each([&](int lane) {
            for (int i = warp.index() * WARP_LANES + lane; i < COLUMNS; i += THREADS) {
                const bool there = args.bias != nullptr && first_column + i < args.factor.rows;
                const int64_t index = (first_column + i) * args.bias_stride;
                shared.bias[i] = there ? widen(narrowed<T>(load_as<Sum>(args.bias, args.bias_dtype, index))) : Sum(0);
            }
        });
    }

    // Moves the tile out, zeroing what dropout drops.
    template <class Warp>
    LORA_TEAM static void write(Warp& warp, Shared& shared, const Args& args, int64_t first_row, int64_t first_column) {
        const int64_t width = args.factor.rows;
        using Target = Tile<T, ROWS, COLUMNS>;
        warp.each([&](int lane) {
            for (int u = warp.index() * WARP_LANES + lane; u < Target::UNITS; u += THREADS) {
                const int i = u / Target::ROW_UNITS, group = u % Target::ROW_UNITS;
                const int64_t row = first_row + i, column = first_column + group * UNIT;
                if (row >= args.hidden.rows || column >= width) continue;
                Unit<T> unit = shared.out.unit(i, group);
                if (args.dropout.seed != nullptr) shared.kept.apply(unit, i, group, first_column);
                T* target = static_cast<T*>(args.out) + row * width + column;
                if (width % UNIT == 0) {  // every unit is whole and aligned, for torch aligns what it allocates
                    *reinterpret_cast<Unit<T>*>(target) = unit;
                } else {
                    LORA_UNROLL for (int j = 0; j < UNIT; ++j) {
                        if (column + j < width) target[j] = unit.at[j];
                    }
                }
            }
        });
    }
};

}  // namespace cuda
}  // namespace lora_kernels
