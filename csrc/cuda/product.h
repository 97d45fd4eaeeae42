// One warp's matrix product, 16 rows x 8 columns a step: the tensor cores' m16n8k16 for 16-bit numbers, multiply-adds
// of the same layout for fp32 and fp64. The index maps here are what a host emulation of the tensor core reads too.
#pragma once

#include "number.h"

namespace lora_kernels {
namespace cuda {

constexpr int THREADS = 128;  // a block
constexpr int WARP_LANES = 32;
constexpr int WARPS = THREADS / WARP_LANES;
constexpr int PRODUCT_ROWS = 16;
constexpr int PRODUCT_COLUMNS = 8;

// Accumulator i (0..3) of `lane` is element (accumulator_row, accumulator_column) of the 16 x 8 result.
LORA_HD int accumulator_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
LORA_HD int accumulator_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }

// 16-bit: which row of a tile's 16-byte rows lane `lane` names to ldmatrix, so that the registers come out as mma's.
// A, 16 x 16 by rows: matrices (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
LORA_HD int a_matrix_row(int lane) { return lane % 16; }
LORA_HD int a_matrix_k(int lane) { return 8 * (lane / 16); }
// B kept by columns (element (k, n) at tile[n][k]): matrices (n 0-7, k 0-7), (n 0-7, k 8-15).
LORA_HD int b_matrix_column(int lane) { return lane % 8; }
LORA_HD int b_matrix_k(int lane) { return 8 * ((lane / 8) % 2); }
// B kept by rows (element (k, n) at tile[k][n]), transposed by ldmatrix: matrices (k 0-7), (k 8-15).
LORA_HD int b_transposed_k(int lane) { return lane % 16; }

template <typename T>
struct Product {                                   // 16-bit numbers
    static constexpr int STEP = 16, UNROLLED = 4;  // elements of the sum a step; steps that a loop unrolls
    struct A {
        uint32_t v[4];
    };
    struct B {
        uint32_t v[2];
    };
    struct C {
        float v[4];
    };
    template <class Warp, typename E>
    LORA_TEAM static void load_a(Warp& warp, typename Warp::template Lanes<A>& a, const E* tile, int width) {
        warp.template load_matrices<4, false>(
            a, [=](int lane) { return tile + a_matrix_row(lane) * width + a_matrix_k(lane); });
    }
    template <class Warp, typename E>
    LORA_TEAM static void load_b(Warp& warp, typename Warp::template Lanes<B>& b, const E* tile, int width) {
        warp.template load_matrices<2, false>(
            b, [=](int lane) { return tile + b_matrix_column(lane) * width + b_matrix_k(lane); });
    }
    template <class Warp, typename E>
    LORA_TEAM static void load_b_rows(Warp& warp, typename Warp::template Lanes<B>& b, const E* tile, int width) {
        warp.template load_matrices<2, true>(b, [=](int lane) { return tile + b_transposed_k(lane) * width; });
    }
    // c[at] += a b
    template <class Warp, class Sums>
    LORA_TEAM static void multiply(Warp& warp, Sums& c, int at, typename Warp::template Lanes<A>& a,
                                   typename Warp::template Lanes<B>& b) {
        warp.template tensor_multiply<typename Number<T>::Factor>(c, at, a, b);
    }
};

template <typename T>
struct PlainProduct {  // fp32 and fp64: each lane reads the two rows of A and the two columns of B that it needs
    static constexpr int STEP = 4, UNROLLED = 1;
    struct A {
        T v[2][STEP];
    };
    struct B {
        T v[2][STEP];
    };
    struct C {
        T v[4];
    };
    template <class Warp>
    LORA_TEAM static void load_a(Warp& warp, typename Warp::template Lanes<A>& a, const T* tile, int width) {
        warp.each([&](int lane) {
            LORA_UNROLL for (int i = 0; i < 2; ++i) {
                LORA_UNROLL for (int k = 0; k < STEP; ++k) a[lane].v[i][k] =
                    tile[accumulator_row(lane, 2 * i) * width + k];
            }
        });
    }
    template <class Warp>
    LORA_TEAM static void load_b(Warp& warp, typename Warp::template Lanes<B>& b, const T* tile, int width) {
        warp.each([&](int lane) {
            LORA_UNROLL for (int i = 0; i < 2; ++i) {
                LORA_UNROLL for (int k = 0; k < STEP; ++k) b[lane].v[i][k] =
                    tile[accumulator_column(lane, i) * width + k];
            }
        });
    }
    template <class Warp>
    LORA_TEAM static void load_b_rows(Warp& warp, typename Warp::template Lanes<B>& b, const T* tile, int width) {
        warp.each([&](int lane) {
            LORA_UNROLL for (int i = 0; i < 2; ++i) {
                LORA_UNROLL for (int k = 0; k < STEP; ++k) b[lane].v[i][k] =
                    tile[k * width + accumulator_column(lane, i)];
            }
        });
    }
    template <class Warp, class Sums>
    LORA_TEAM static void multiply(Warp& warp, Sums& c, int at, typename Warp::template Lanes<A>& a,
                                   typename Warp::template Lanes<B>& b) {
        warp.each([&](int lane) {
            LORA_UNROLL for (int k = 0; k < STEP; ++k) {
                LORA_UNROLL for (int i = 0; i < 4; ++i) c[lane].tile[at].v[i] +=
                    a[lane].v[i / 2][k] * b[lane].v[i % 2][k];
            }
        });
    }
};

template <>
struct Product<float> : PlainProduct<float> {};
template <>
struct Product<double> : PlainProduct<double> {};

// Of two fp16 numbers in a register, their high and low bf16 parts, which together hold all their bits. What is
// infinite or NaN has no low part.
LORA_HD void split_pair(uint32_t pair, uint32_t& high, uint32_t& low) {
    high = low = 0;
    LORA_UNROLL for (int half = 0; half < 2; ++half) {
        const float value = widen(Half{static_cast<uint16_t>(pair >> (16 * half))});
        const BFloat16 upper = narrowed<BFloat16>(value);
        const float rest = value - widen(upper);
        const BFloat16 lower = narrowed<BFloat16>(is_finite(rest) ? rest : 0.0f);
        high |= static_cast<uint32_t>(upper.bits) << (16 * half);
        low |= static_cast<uint32_t>(lower.bits) << (16 * half);
    }
}

// Of two bf16 numbers those that are finite, 0 for the others.
LORA_HD uint32_t finite_pair(uint32_t pair) {
    if ((pair & 0x7F80u) == 0x7F80u) pair &= 0xFFFF0000u;
    if ((pair & 0x7F800000u) == 0x7F800000u) pair &= 0xFFFFu;
    return pair;
}

// A fragment of fp16 numbers becomes that of their high parts, and `low` that of the others.
template <class Warp, class Lanes>
LORA_TEAM void split(Warp& warp, Lanes& high, Lanes& low) {
    warp.each([&](int lane) {
        LORA_UNROLL for (int i = 0; i < static_cast<int>(sizeof(high[lane].v) / 4); ++i) {
            const uint32_t pair = high[lane].v[i];
            split_pair(pair, high[lane].v[i], low[lane].v[i]);
        }
    });
}

// c[at] += a b where all operands have two parts: 16 bits of each count. An infinite a meets b's high part alone, for
// its low part may be 0.
template <typename T, class Warp, class Sums, class A, class B>
LORA_TEAM void multiply_wide(Warp& warp, Sums& c, int at, A& high, A& low, B& b_high, B& b_low) {
    A finite;
    warp.each(
        [&](int lane) { LORA_UNROLL for (int i = 0; i < 4; ++i) finite[lane].v[i] = finite_pair(high[lane].v[i]); });
    Product<T>::multiply(warp, c, at, low, b_high);
    Product<T>::multiply(warp, c, at, finite, b_low);
    Product<T>::multiply(warp, c, at, high, b_high);
}

// What a warp sums up: COUNT results of 16 x 8.
template <typename T, int COUNT>
struct Sums {
    typename Product<T>::C tile[COUNT];
};

template <class Warp, class State>
LORA_TEAM void clear(Warp& warp, State& sums) {
    warp.each([&](int lane) {
        auto& tiles = sums[lane].tile;
        LORA_UNROLL for (int at = 0; at < static_cast<int>(sizeof(tiles) / sizeof(tiles[0])); ++at) {
            LORA_UNROLL for (int i = 0; i < 4; ++i) tiles[at].v[i] = 0;
        }
    });
}

}  // namespace cuda
}  // namespace lora_kernels
