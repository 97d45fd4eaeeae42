// dh with db in one read of dy, for ranks up to 16.
#pragma once

#include "plan.h"
#include "stage.h"

namespace lora_kernels {
namespace cuda {

struct DhDbArgs {
    Matrix dy;
    Operand b;
    Operand hidden;
    void* dh_parts;
    void* db_parts;
    Slices slices;
};

// dh_parts[column tile] = dy B over the tile's columns; db_parts[slice] = dyᵀ h over the slice of M. Stage two (Reduce)
// adds either in order and multiplies by the scaling.
//
//   dy        (M, N)              T; unit column stride, any row stride
//   b         (R, N)              lora_bᵀ: any dtype, any strides; rounded to T; R <= 16; over fp16 two bf16 parts, as
//                                 hidden then has, and dy is split in registers
//   hidden    (R, M)              hᵀ: fp32 (fp64), any strides; 16-bit T: as a high and a low part
//   dh_parts  (tiles of N, M, R)  fp32 (fp64), contiguous
//   db_parts  (count, N, R)       fp32 (fp64), contiguous
//
// Grid: slice-major over (slices of M, tiles of COLUMNS columns). Of each step's ROWS x COLUMNS of dy a warp multiplies
// 16 rows by B, and a quarter of the columns by h. Sums in fp32 (fp64); 4 M N R flops (6 in 16 bits); reads dy once,
// writes (N / COLUMNS) M R + count N R sums: a quarter of dy's bytes at R = 16, which is why larger ranks take Shrink
// and Gradient, a read of dy each.
template <typename T>
struct DhDb {
    using Args = DhDbArgs;
    using P = Product<T>;
    using Sum = typename Number<T>::Sum;
    using Factor = typename Number<T>::Factor;
    static constexpr bool TENSOR = Number<T>::SPLIT;
    static constexpr int RANKS = 16,
                         ROWS = sizeof(T) == 8    ? 32
                                : Number<T>::WIDE ? 48
                                                  : 64,
                         COLUMNS = 256 / static_cast<int>(sizeof(T));
    static constexpr int WARP_COLUMNS = COLUMNS / WARPS;
    static constexpr int ACROSS = WARP_COLUMNS / PRODUCT_COLUMNS, RANK_SUMS = RANKS / PRODUCT_COLUMNS;
    static constexpr int MINIMUM_STEPS = 4;

    struct Shared : LowFactor<T, RANKS, COLUMNS, 1> {
        Tile<T, ROWS, COLUMNS> dy[2];
        Tile<Factor, RANKS, ROWS> high[2];
        Tile<Factor, Number<T>::SPLIT ? RANKS : 1, ROWS> low[2];
        Tile<Factor, RANKS, COLUMNS> b;
    };

    static int64_t tiles(int64_t columns) { return ceil_div(columns, COLUMNS); }
    static Slices slices(int64_t rows, int64_t columns) { return slices_of(rows, ROWS, tiles(columns), MINIMUM_STEPS); }
    static int64_t blocks(const Args& args) { return args.slices.count * tiles(args.dy.columns); }

    template <class Warp>
    LORA_TEAM static void run(Warp& warp, Shared& shared, const Args& args, int64_t block) {
        const int64_t tiles = ceil_div(args.dy.columns, COLUMNS), slice = block / tiles, tile = block % tiles;
        const int64_t begin = slice_begin(args.slices, slice), end = slice_end(args.slices, slice, args.dy.rows);
        const int64_t steps = ceil_div(end - begin, ROWS), first_column = tile * COLUMNS;
        typename Warp::template Lanes<Sums<T, ACROSS>> db;
        clear(warp, db);

        const auto stage = [&](int64_t step) {
            const int64_t row = begin + step * ROWS;
            stage_matrix(warp, shared.dy[step % 2], args.dy, row, end, first_column);
            stage_hidden(warp, shared.high[step % 2], shared.low[step % 2], args.hidden, 0, row, end);
            warp.commit();
        };
        stage_factor(warp, shared.b, shared.low_factor(0), args.b, 0, first_column, args.dy.columns);
        if (steps > 0) stage(0);
        for (int64_t step = 0; step < steps; ++step) {
            if (step + 1 < steps) {
                stage(step + 1);
                warp.template wait<1>();
            } else {
                warp.template wait<0>();
            }
            warp.barrier();
            multiply_dh(warp, shared, args, step % 2, tile, begin + step * ROWS);
            multiply_db(warp, shared, step % 2, db);
            warp.barrier();
        }
        write_db(warp, args, slice, first_column, db);
    }

    // dh of one step's rows, summed over the tile's columns, into its part.
    template <class Warp>
    LORA_TEAM static void multiply_dh(Warp& warp, Shared& shared, const Args& args, int buffer, int64_t tile,
                                      int64_t first_row) {
        if (warp.index() * PRODUCT_ROWS >= ROWS) return;
        auto& dy = shared.dy[buffer];
        typename Warp::template Lanes<Sums<T, RANK_SUMS>> dh;
        clear(warp, dh);
        LORA_UNROLL_STEPS for (int n = 0; n < COLUMNS; n += P::STEP) {
            typename Warp::template Lanes<typename P::A> rows, low_rows;
            typename Warp::template Lanes<typename P::B> ranks, low_ranks;
            P::load_a(warp, rows, dy.at(warp.index() * PRODUCT_ROWS, n), dy.WIDTH);
            if constexpr (Number<T>::WIDE) split(warp, rows, low_rows);
            LORA_UNROLL for (int at = 0; at < RANK_SUMS; ++at) {
                P::load_b(warp, ranks, shared.b.at(at * PRODUCT_COLUMNS, n), shared.b.WIDTH);
                if constexpr (Number<T>::WIDE) {
                    P::load_b(warp, low_ranks, shared.low_factor(0)->at(at * PRODUCT_COLUMNS, n), shared.b.WIDTH);
                    multiply_wide<T>(warp, dh, at, rows, low_rows, ranks, low_ranks);
                } else {
                    P::multiply(warp, dh, at, rows, ranks);
                }
            }
        }
        Sum* part = static_cast<Sum*>(args.dh_parts) + tile * args.dy.rows * args.b.rows;
        warp.each([&](int lane) {
            LORA_UNROLL for (int at = 0; at < RANK_SUMS; ++at) {
                LORA_UNROLL for (int i = 0; i < 4; ++i) {
                    const int64_t row = first_row + warp.index() * PRODUCT_ROWS + accumulator_row(lane, i);
                    const int64_t rank = at * PRODUCT_COLUMNS + accumulator_column(lane, i);
                    if (row < args.dy.rows && rank < args.b.rows)
                        part[row * args.b.rows + rank] = dh[lane].tile[at].v[i];
                }
            }
        });
    }

    // db += hᵀ dy of one step's rows, for the warp's columns.
    template <class Warp, class DbSums>
    LORA_TEAM static void multiply_db(Warp& warp, Shared& shared, int buffer, DbSums& db) {
        auto& dy = shared.dy[buffer];
        auto& high = shared.high[buffer];
        LORA_UNROLL_STEPS for (int m = 0; m < ROWS; m += P::STEP) {
            typename Warp::template Lanes<typename P::A> upper, lower;
            typename Warp::template Lanes<typename P::B> column, low_column;
            P::load_a(warp, upper, high.at(0, m), high.WIDTH);
            if constexpr (Number<T>::SPLIT) P::load_a(warp, lower, shared.low[buffer].at(0, m), high.WIDTH);
            LORA_UNROLL for (int across = 0; across < ACROSS; ++across) {
                P::load_b_rows(warp, column, dy.at(m, warp.index() * WARP_COLUMNS + across * PRODUCT_COLUMNS),
                               dy.WIDTH);
                if constexpr (Number<T>::WIDE) {
                    split(warp, column, low_column);
                    multiply_wide<T>(warp, db, across, upper, lower, column, low_column);
                } else {
                    P::multiply(warp, db, across, upper, column);
                    if constexpr (Number<T>::SPLIT) P::multiply(warp, db, across, lower, column);
                }
            }
        }
    }

    template <class Warp, class DbSums>
    LORA_TEAM static void write_db(Warp& warp, const Args& args, int64_t slice, int64_t first_column, DbSums& db) {
        Sum* part = static_cast<Sum*>(args.db_parts) + slice * args.dy.columns * args.b.rows;
        warp.each([&](int lane) {
            LORA_UNROLL for (int across = 0; across < ACROSS; ++across) {
                LORA_UNROLL for (int i = 0; i < 4; ++i) {
                    const int64_t rank = accumulator_row(lane, i);
                    const int64_t column = first_column + warp.index() * WARP_COLUMNS + across * PRODUCT_COLUMNS +
                                           accumulator_column(lane, i);
                    if (rank < args.b.rows && column < args.dy.columns) {
                        part[column * args.b.rows + rank] = db[lane].tile[across].v[i];
                    }
                }
            }
        });
    }
};

}  // namespace cuda
}  // namespace lora_kernels
