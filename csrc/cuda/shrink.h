// The skinny product over the long dimension: h of the forward, dh of the backward.
#pragma once

#include "plan.h"
#include "stage.h"

namespace lora_kernels {
namespace cuda {

struct ShrinkArgs {
    Matrix x;
    Operand a;
    Dropout dropout;
    void* out;
    Slices slices;
    double scale;
};

// out[slice] = scale (x * keep) Aᵀ over the slice of K. Forward: x, A = lora_a, the mask's seed. dh: x = dy, A =
// lora_bᵀ, no seed.
//
//   x     (M, K)          T; unit column stride, any row stride
//   a     (R, K)          any dtype, any strides; rounded to T; over fp16 two bf16 parts, and x is split in registers
//   out   (count, M, R)   sums (fp32; fp64 for fp64); contiguous. One slice: the result, else partial sums for Reduce
//
// Grid: slice-major over (slices, tiles of ROWS rows, groups of RANKS ranks); a warp owns 16 rows. Sums in fp32 (fp64);
// 2 M K R flops; reads x once for each group of ranks, A once a row of tiles (from L2), writes count M R sums. Two
// buffers: the copy of one step's x runs while the other's is multiplied.
template <typename T, int RANKS_>
struct Shrink {
    using Args = ShrinkArgs;
    using P = Product<T>;
    using Sum = typename Number<T>::Sum;
    static constexpr bool TENSOR = Number<T>::SPLIT;
    using Factor = typename Number<T>::Factor;
    static constexpr bool NARROW = Number<T>::WIDE && RANKS_ > 16;  // as much of A as there is room for in two parts
    static constexpr int RANKS = RANKS_, ROWS = 16 * WARPS, COLUMNS = NARROW ? 32 : 128 / static_cast<int>(sizeof(T));
    static constexpr int SUMS = RANKS / PRODUCT_COLUMNS;
    static constexpr int MINIMUM_STEPS = 4;

    struct Shared : LowFactor<T, RANKS, COLUMNS, 2> {
        Tile<T, ROWS, COLUMNS> x[2];
        Tile<Factor, RANKS, COLUMNS> a[2];
        KeepWords<ROWS, COLUMNS> kept[2];
    };

    static int64_t tiles(int64_t rows, int64_t ranks) { return ceil_div(rows, ROWS) * ceil_div(ranks, RANKS); }
    static Slices slices(int64_t rows, int64_t columns, int64_t ranks) {
        return slices_of(columns, COLUMNS, tiles(rows, ranks), MINIMUM_STEPS);
    }
    static int64_t blocks(const Args& args) { return args.slices.count * tiles(args.x.rows, args.a.rows); }

    template <class Warp>
    LORA_TEAM static void run(Warp& warp, Shared& shared, const Args& args, int64_t block) {
        const int64_t groups = ceil_div(args.a.rows, RANKS), per_slice = ceil_div(args.x.rows, ROWS) * groups;
        const int64_t slice = block / per_slice;
        const int64_t first_row = block % per_slice / groups * ROWS, first_rank = block % groups * RANKS;
        const int64_t begin = slice_begin(args.slices, slice), end = slice_end(args.slices, slice, args.x.columns);
        const int64_t steps = ceil_div(end - begin, COLUMNS);
        const bool dropping = args.dropout.seed != nullptr;
        typename Warp::template Lanes<Sums<T, SUMS>> sums;
        clear(warp, sums);

        const auto stage = [&](int64_t step) {
            const int64_t column = begin + step * COLUMNS;
            stage_matrix(warp, shared.x[step % 2], args.x, first_row, args.x.rows, column);
            stage_factor(warp, shared.a[step % 2], shared.low_factor(step % 2), args.a, first_rank, column, end);
            warp.commit();
            if (dropping) shared.kept[step % 2].draw(warp, args.dropout, first_row, column);
        };
        if (steps > 0) stage(0);
        if (dropping) warp.barrier();  // the loop's barriers publish the words of later steps
        for (int64_t step = 0; step < steps; ++step) {
            if (step + 1 < steps) {
                stage(step + 1);
                warp.template wait<1>();
            } else {
                warp.template wait<0>();
            }
            auto& x = shared.x[step % 2];
            auto& a = shared.a[step % 2];
            if (dropping) drop_tile(warp, x, shared.kept[step % 2], begin + step * COLUMNS);
            warp.barrier();
            LORA_UNROLL_STEPS for (int k = 0; k < COLUMNS; k += P::STEP) {
                typename Warp::template Lanes<typename P::A> rows, low_rows;
                typename Warp::template Lanes<typename P::B> ranks, low_ranks;
                P::load_a(warp, rows, x.at(warp.index() * PRODUCT_ROWS, k), x.WIDTH);
                if constexpr (Number<T>::WIDE) split(warp, rows, low_rows);
                LORA_UNROLL for (int at = 0; at < SUMS; ++at) {
                    P::load_b(warp, ranks, a.at(at * PRODUCT_COLUMNS, k), a.WIDTH);
                    if constexpr (Number<T>::WIDE) {
                        P::load_b(warp, low_ranks, shared.low_factor(step % 2)->at(at * PRODUCT_COLUMNS, k), a.WIDTH);
                        multiply_wide<T>(warp, sums, at, rows, low_rows, ranks, low_ranks);
                    } else {
                        P::multiply(warp, sums, at, rows, ranks);
                    }
                }
            }
            warp.barrier();
        }

        Sum* out = static_cast<Sum*>(args.out) + slice * args.x.rows * args.a.rows;
        warp.each([&](int lane) {
            LORA_UNROLL for (int at = 0; at < SUMS; ++at) {
                LORA_UNROLL for (int i = 0; i < 4; ++i) {
                    const int64_t row = first_row + warp.index() * PRODUCT_ROWS + accumulator_row(lane, i);
                    const int64_t rank = first_rank + at * PRODUCT_COLUMNS + accumulator_column(lane, i);
                    if (row < args.x.rows && rank < args.a.rows) {
                        out[row * args.a.rows + rank] = static_cast<Sum>(args.scale) * sums[lane].tile[at].v[i];
                    }
                }
            }
        });
    }
};

}  // namespace cuda
}  // namespace lora_kernels
