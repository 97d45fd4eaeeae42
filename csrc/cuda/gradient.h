// The skinny product over the tokens: da = dhᵀ (x * keep), and db = dyᵀ h for ranks above the fused kernel's.
#pragma once

#include "plan.h"
#include "stage.h"

namespace lora_kernels {
namespace cuda {

struct GradientArgs {
    Matrix x;
    Operand hidden;
    Dropout dropout;
    void* parts;
    Slices slices;
    int64_t part_rank_stride, part_column_stride;
};

// part[slice][r, c] = Σ over the slice of M of hidden[r, m] (x * keep)[m, c].
//
//   x       (M, C)          T; unit column stride, any row stride: x for da, dy for db
//   hidden  (R, M)          fp32 (fp64), any strides: dhᵀ or hᵀ; 16-bit T: as a high and a low part, so that it keeps
//                        its bits; over fp16 the parts are bf16, and x is split in registers
//   parts   (count, R C) fp32 (fp64), R C by the two strides: in the gradient's own layout, for Reduce
//
// Grid: slice-major over (slices, tiles of COLUMNS columns, groups of RANKS ranks); a warp owns a quarter of the
// columns and all ranks. Sums in fp32 (fp64), stage two adds the slices in order: no atomics. 2 M C R flops (twice that
// in 16 bits); reads x once for each group of ranks, hidden once a column tile (from L2), writes count R C sums.
template <typename T, int RANKS_>
struct Gradient {
    using Args = GradientArgs;
    using P = Product<T>;
    using Sum = typename Number<T>::Sum;
    using Factor = typename Number<T>::Factor;
    static constexpr bool TENSOR = Number<T>::SPLIT;
    static constexpr int RANKS = RANKS_, ROWS = 32, COLUMNS = 256 / static_cast<int>(sizeof(T));
    static constexpr int WARP_COLUMNS = COLUMNS / WARPS;
    static constexpr int ACROSS = WARP_COLUMNS / PRODUCT_COLUMNS, DOWN = RANKS / PRODUCT_ROWS;
    static constexpr int MINIMUM_STEPS = 8;

    struct Shared {
        Tile<T, ROWS, COLUMNS> x[2];
        Tile<Factor, RANKS, ROWS> high[2];
        Tile<Factor, Number<T>::SPLIT ? RANKS : 1, ROWS> low[2];
        KeepWords<ROWS, COLUMNS> kept[2];
    };

    static int64_t tiles(int64_t columns, int64_t ranks) { return ceil_div(columns, COLUMNS) * ceil_div(ranks, RANKS); }
    static Slices slices(int64_t rows, int64_t columns, int64_t ranks) {
        return slices_of(rows, ROWS, tiles(columns, ranks), MINIMUM_STEPS);
    }
    static int64_t blocks(const Args& args) { return args.slices.count * tiles(args.x.columns, args.hidden.rows); }

    template <class Warp>
    LORA_TEAM static void run(Warp& warp, Shared& shared, const Args& args, int64_t block) {
        const int64_t groups = ceil_div(args.hidden.rows, RANKS),
                      per_slice = ceil_div(args.x.columns, COLUMNS) * groups;
        const int64_t slice = block / per_slice;
        const int64_t first_column = block % per_slice / groups * COLUMNS, first_rank = block % groups * RANKS;
        const int64_t begin = slice_begin(args.slices, slice), end = slice_end(args.slices, slice, args.x.rows);
        const int64_t steps = ceil_div(end - begin, ROWS);
        const bool dropping = args.dropout.seed != nullptr;
        const int warp_column = warp.index() * WARP_COLUMNS;
        typename Warp::template Lanes<Sums<T, DOWN * ACROSS>> sums;
        clear(warp, sums);

        const auto stage = [&](int64_t step) {
            const int64_t row = begin + step * ROWS;
            stage_matrix(warp, shared.x[step % 2], args.x, row, end, first_column);
            stage_hidden(warp, shared.high[step % 2], shared.low[step % 2], args.hidden, first_rank, row, end);
            warp.commit();
            if (dropping) shared.kept[step % 2].draw(warp, args.dropout, row, first_column);
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
            if (dropping) drop_tile(warp, x, shared.kept[step % 2], first_column);
            warp.barrier();
            LORA_UNROLL_STEPS for (int m = 0; m < ROWS; m += P::STEP) {
                typename Warp::template Lanes<typename P::B> columns[ACROSS], low_columns[ACROSS];
                LORA_UNROLL for (int across = 0; across < ACROSS; ++across) {
                    P::load_b_rows(warp, columns[across], x.at(m, warp_column + across * PRODUCT_COLUMNS), x.WIDTH);
                    if constexpr (Number<T>::WIDE) split(warp, columns[across], low_columns[across]);
                }
                LORA_UNROLL for (int down = 0; down < DOWN; ++down) {
                    typename Warp::template Lanes<typename P::A> ranks, low_ranks;
                    auto& high = shared.high[step % 2];
                    P::load_a(warp, ranks, high.at(down * PRODUCT_ROWS, m), high.WIDTH);
                    if constexpr (Number<T>::WIDE) {
                        P::load_a(warp, low_ranks, shared.low[step % 2].at(down * PRODUCT_ROWS, m), high.WIDTH);
                        LORA_UNROLL for (int across = 0; across < ACROSS; ++across) {
                            multiply_wide<T>(warp, sums, down * ACROSS + across, ranks, low_ranks, columns[across],
                                             low_columns[across]);
                        }
                        continue;
                    }
                    LORA_UNROLL for (int across = 0; across < ACROSS; ++across) {
                        P::multiply(warp, sums, down * ACROSS + across, ranks, columns[across]);
                    }
                    if constexpr (Number<T>::SPLIT) {
                        P::load_a(warp, ranks, shared.low[step % 2].at(down * PRODUCT_ROWS, m), high.WIDTH);
                        LORA_UNROLL for (int across = 0; across < ACROSS; ++across) {
                            P::multiply(warp, sums, down * ACROSS + across, ranks, columns[across]);
                        }
                    }
                }
            }
            warp.barrier();
        }

        Sum* part = static_cast<Sum*>(args.parts) + slice * args.hidden.rows * args.x.columns;
        warp.each([&](int lane) {
            LORA_UNROLL for (int at = 0; at < DOWN * ACROSS; ++at) {
                LORA_UNROLL for (int i = 0; i < 4; ++i) {
                    const int64_t rank = first_rank + at / ACROSS * PRODUCT_ROWS + accumulator_row(lane, i);
                    const int64_t column =
                        first_column + warp_column + at % ACROSS * PRODUCT_COLUMNS + accumulator_column(lane, i);
                    if (rank < args.hidden.rows && column < args.x.columns) {
                        part[rank * args.part_rank_stride + column * args.part_column_stride] =
                            sums[lane].tile[at].v[i];
                    }
                }
            }
        });
    }
};

}  // namespace cuda
}  // namespace lora_kernels
