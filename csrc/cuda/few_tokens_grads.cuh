// Backward for M <= 16 tokens, in two launches, without an atomic: dx (M, K) = dy W + D * (dh A), da (R, K) = dhᵀ (D *
// x), db (N, R) = s dyᵀ h and dbias (N), with dh (M, R) = s dy B.
//
//   dy     bf16 (M, N), rows of `ld_dy` numbers                     A, B  bf16 or fp32, in one piece
//   W      bf16 (N, K), in one piece, 16-byte aligned               h     fp32 (M, R), or the operand, which has s in
//   it x      bf16 (M, K), rows of `ldx` numbers                       words the packed mask, or null
//
// The first launch reads W once. Blocks [0, slices) each take a slice of N: a part of dh, and their rows of db and
// dbias. The others take 64 columns of K and one of `splits` slices of N: NW warps divide its rows and stream W through
// rings in registers; the block leaves a part of dy W, fp32. The second launch takes 32 columns of K a block: it sums
// the parts in a fixed order, and adds what dh gives. Everything is summed in fp32; A and B enter as they are.
#pragma once

#ifndef LORA_FEW_TOKENS_ON_HOST
#include "few_tokens_device.cuh"
#endif

namespace lora_kernels {
namespace few {

constexpr int GRAD_WARPS = 8, GRAD_THREADS = 32 * GRAD_WARPS, GRAD_DEPTH = 3;
constexpr int GRAD_COLUMNS = 64, LAST_COLUMNS = 32, GRAD_RANKS = 64, GRAD_TOKENS = 16, GRAD_ROWS = 64;

enum { NUMBER_BF16 = 0, NUMBER_FP32 = 1 };

struct GradParams {
    const bf16* dy;
    const bf16* W;
    const void* B;
    const void* h;
    float* dx_parts;  // (splits, M, K); null: dx is not due
    float* dh_parts;  // (slices, M, R)
    void* db;         // null: not due, as dbias
    void* dbias;
    int M, N, K, R, ld_dy, rank, b32, bias32, slices, splits;
    float s;
};

struct LastParams {
    const float* dx_parts;
    const float* dh_parts;
    const void* A;
    const bf16* x;
    const unsigned* words;
    bf16* dx;  // null: not due, as da
    void* da;
    int M, K, R, ldx, row_words, a32, slices, splits, early;
    float s, keep;  // keep: 1 / (1 - p)
};

__device__ __forceinline__ float number_at(const void* p, size_t i, int fp32) {
    return fp32 ? ((const float*)p)[i] : widen(((const bf16*)p)[i]);
}
__device__ __forceinline__ void put_number(void* p, size_t i, float v, int fp32) {
    if (fp32)
        ((float*)p)[i] = v;
    else
        ((bf16*)p)[i] = narrow(v);
}

// What of h enters db: s h.
__device__ __forceinline__ float scaled_h(const GradParams& p, int m, int r) {
    if (!p.rank) return p.s * ((const float*)p.h)[m * p.R + r];
    const bf16* h = (const bf16*)p.h + m * 2 * p.rank;
    return widen(h[r]) + widen(h[p.rank + r]);
}

// A slice of N: a part of dh, db and dbias.
__device__ __forceinline__ void narrow_grads(const GradParams& p, char* sm) {
    float (*Bs)[GRAD_RANKS + 1] = (float (*)[GRAD_RANKS + 1]) sm;
    float (*dys)[GRAD_ROWS + 1] = (float (*)[GRAD_ROWS + 1])(Bs + GRAD_ROWS);
    float (*hs)[GRAD_RANKS] = (float (*)[GRAD_RANKS])(dys + GRAD_TOKENS);
    const int tid = threadIdx.x, R = p.R;
    const int n_first = (int)((long long)blockIdx.x * p.N / p.slices);
    const int n_end = (int)((long long)(blockIdx.x + 1) * p.N / p.slices);
    if (p.db)
        for (int i = tid; i < p.M * R; i += GRAD_THREADS) hs[i / R][i % R] = scaled_h(p, i / R, i % R);
    float acc[GRAD_TOKENS * GRAD_RANKS / GRAD_THREADS] = {};
    for (int n0 = n_first; n0 < n_end; n0 += GRAD_ROWS) {
        const int rows = min(GRAD_ROWS, n_end - n0);
        __syncthreads();
        for (int i = tid; i < rows * R; i += GRAD_THREADS) Bs[i / R][i % R] = number_at(p.B, (size_t)n0 * R + i, p.b32);
        for (int i = tid; i < p.M * GRAD_ROWS; i += GRAD_THREADS) {
            const int m = i / GRAD_ROWS, n = i % GRAD_ROWS;
            dys[m][n] = n < rows ? widen(p.dy[(size_t)m * p.ld_dy + n0 + n]) : 0.f;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < GRAD_TOKENS * GRAD_RANKS / GRAD_THREADS; ++j) {
            const int i = tid + j * GRAD_THREADS;
            if (i < p.M * R) {
                const int m = i / R, r = i % R;
                for (int n = 0; n < rows; ++n) acc[j] += dys[m][n] * Bs[n][r];
            }
        }
        if (p.db)
            for (int i = tid; i < rows * R; i += GRAD_THREADS) {
                const int n = i / R, r = i % R;
                float v = 0.f;
                for (int m = 0; m < p.M; ++m) v += dys[m][n] * hs[m][r];
                put_number(p.db, (size_t)n0 * R + i, v, p.b32);
            }
        if (p.dbias && tid < rows) {
            float v = 0.f;
            for (int m = 0; m < p.M; ++m) v += dys[m][tid];
            put_number(p.dbias, n0 + tid, v, p.bias32);
        }
    }
#pragma unroll
    for (int j = 0; j < GRAD_TOKENS * GRAD_RANKS / GRAD_THREADS; ++j) {
        const int i = tid + j * GRAD_THREADS;
        if (i < p.M * R) p.dh_parts[(size_t)blockIdx.x * p.M * R + i] = acc[j];
    }
}

// dy[m, n] and dy[m, n + 1]; zeros where they are not there.
__device__ __forceinline__ uint32_t dy2(const GradParams& p, int m, int n) {
    if (m >= p.M || n >= p.N) return 0;
    const bf16* at = p.dy + (size_t)m * p.ld_dy + n;
    const uint32_t low = at->bits, high = n + 1 < p.N ? at[1].bits : 0;
    return low | high << 16;
}

// 16 rows of W of 64 columns: lane (g, t) holds columns 8 g .. 8 g + 7 of rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9, and
// dy's.
template <int NT>
struct GradChunk {
    uint4 w[4];
    uint32_t dy[NT][2];
};

// Word j of two rows' pieces are two columns of each: paired by row, they are the product's fragments, with W turned.
template <int NT>
__device__ __forceinline__ void grad_mma(float (&acc)[4][NT][4], const GradChunk<NT>& f) {
    const uint32_t words[4][4] = {{f.w[0].x, f.w[0].y, f.w[0].z, f.w[0].w},
                                  {f.w[1].x, f.w[1].y, f.w[1].z, f.w[1].w},
                                  {f.w[2].x, f.w[2].y, f.w[2].z, f.w[2].w},
                                  {f.w[3].x, f.w[3].y, f.w[3].z, f.w[3].w}};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const uint32_t a0 = __byte_perm(words[0][j], words[1][j], 0x5410);
        const uint32_t a1 = __byte_perm(words[0][j], words[1][j], 0x7632);
        const uint32_t a2 = __byte_perm(words[2][j], words[3][j], 0x5410);
        const uint32_t a3 = __byte_perm(words[2][j], words[3][j], 0x7632);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) mma(acc[j][nt], a0, a1, a2, a3, f.dy[nt][0], f.dy[nt][1]);
    }
}

// 64 columns of a part of dy W.
template <int NT>
__device__ __forceinline__ void wide_grad(const GradParams& p, float* sums, int block) {
    constexpr int D = GRAD_DEPTH, TOK = 8 * NT, LDS = GRAD_COLUMNS + 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int k0 = block / p.splits * GRAD_COLUMNS, split = block % p.splits;
    const int chunks = (p.N + 15) / 16;
    const int first = (int)((long long)split * chunks / p.splits) + warp;
    const int end = (int)((long long)(split + 1) * chunks / p.splits);
    const int total = first < end ? (end - first + GRAD_WARPS - 1) / GRAD_WARPS : 0;
    float acc[4][NT][4] = {};
    GradChunk<NT> ring[D];
    auto issue = [&](GradChunk<NT>& f, int it) {
        const int n0 = (first + it * GRAD_WARPS) * 16 + 2 * t;
        const bf16* w = p.W + k0 + 8 * g;
#pragma unroll
        for (int i = 0; i < 4;
             ++i)  // rows that are not there meet zeros of dy: any finite or not, they must not be NaN
            f.w[i] = n0 + (i & 1) + 8 * (i >> 1) < p.N ? ldg_stream(w + (size_t)(n0 + (i & 1) + 8 * (i >> 1)) * p.K)
                                                       : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            f.dy[nt][0] = dy2(p, nt * 8 + g, n0);
            f.dy[nt][1] = dy2(p, nt * 8 + g, n0 + 8);
        }
    };
#pragma unroll
    for (int d = 0; d < D; ++d)
        if (d < total) issue(ring[d], d);
    for (int it = 0; it < total; it += D) {
#pragma unroll
        for (int d = 0; d < D; ++d)
            if (it + d < total) {
                grad_mma<NT>(acc, ring[d]);
                if (it + d + D < total) issue(ring[d], it + d + D);
            }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                sums[(warp * TOK + nt * 8 + 2 * t + (e & 1)) * LDS + 8 * g + 2 * j + (e >> 1)] = acc[j][nt][e];
    __syncthreads();
    float* out = p.dx_parts + (size_t)split * p.M * p.K;
    for (int i = threadIdx.x; i < p.M * GRAD_COLUMNS; i += GRAD_THREADS) {
        const int m = i / GRAD_COLUMNS, k = i % GRAD_COLUMNS;
        float v = 0.f;
#pragma unroll
        for (int w = 0; w < GRAD_WARPS; ++w) v += sums[(w * TOK + m) * LDS + k];
        out[(size_t)m * p.K + k0 + k] = v;
    }
}

template <int NT>
struct FirstGrads {
    static constexpr int WIDE = GRAD_WARPS * 8 * NT * (GRAD_COLUMNS + 1) * 4;
    static constexpr int NARROW = (GRAD_ROWS * (GRAD_RANKS + 1) + GRAD_TOKENS * (GRAD_ROWS + 1 + GRAD_RANKS)) * 4;
    static constexpr int SHARED = WIDE > NARROW ? WIDE : NARROW;
};

template <int NT>
__device__ __forceinline__ void first_grads(const GradParams& p) {
    LORA_SHARED_MEMORY(sm);
    grid_launch_dependents();
    if ((int)blockIdx.x < p.slices)
        narrow_grads(p, sm);
    else
        wide_grad<NT>(p, (float*)sm, (int)blockIdx.x - p.slices);
}

constexpr int LAST_SHARED =
    (GRAD_TOKENS * GRAD_RANKS + GRAD_RANKS * LAST_COLUMNS + GRAD_TOKENS * (LAST_COLUMNS + 1)) * 4;

// 32 columns of dx and da. A word of the mask is 32 columns.
__device__ __forceinline__ void last_grads(const LastParams& p) {
    LORA_SHARED_MEMORY(sm);
    float* dh = (float*)sm;  // (M, R)
    float (*As)[LAST_COLUMNS] = (float (*)[LAST_COLUMNS])(dh + GRAD_TOKENS * GRAD_RANKS);
    float (*xs)[LAST_COLUMNS + 1] = (float (*)[LAST_COLUMNS + 1])(As + GRAD_RANKS);
    const int tid = threadIdx.x, k0 = (int)blockIdx.x * LAST_COLUMNS, R = p.R;
    if (p.dx)
        for (int i = tid; i < R * LAST_COLUMNS; i += GRAD_THREADS)
            As[i / LAST_COLUMNS][i % LAST_COLUMNS] =
                number_at(p.A, (size_t)(i / LAST_COLUMNS) * p.K + k0 + i % LAST_COLUMNS, p.a32);
    for (int i = tid; i < p.M * LAST_COLUMNS; i += GRAD_THREADS) {
        const int m = i / LAST_COLUMNS, k = i % LAST_COLUMNS;
        const bool kept = !p.words || (p.words[(size_t)m * p.row_words + k0 / 32] >> k & 1);
        // D * x where da is due, else D itself, which dx takes from the words
        xs[m][k] = !kept ? 0.f : p.da ? p.keep * widen(p.x[(size_t)m * p.ldx + k0 + k]) : p.keep;
    }
    if (p.early) grid_wait();
    for (int i = tid; i < p.M * R; i += GRAD_THREADS) {
        float v = 0.f;
        for (int q = 0; q < p.slices; ++q) v += ldg_l2(p.dh_parts + (size_t)q * p.M * R + i);
        dh[i] = p.s * v;
    }
    __syncthreads();
    if (p.dx)
        for (int i = tid; i < p.M * LAST_COLUMNS; i += GRAD_THREADS) {
            const int m = i / LAST_COLUMNS, k = i % LAST_COLUMNS;
            float low = 0.f, v = 0.f;
            for (int r = 0; r < R; ++r) low += dh[m * R + r] * As[r][k];
            for (int q = 0; q < p.splits; ++q) v += ldg_l2(p.dx_parts + ((size_t)q * p.M + m) * p.K + k0 + k);
            const bool kept = !p.words || (p.words[(size_t)m * p.row_words + k0 / 32] >> k & 1);
            p.dx[(size_t)m * p.K + k0 + k] = narrow(kept ? v + p.keep * low : v);
        }
    if (p.da)
        for (int i = tid; i < R * LAST_COLUMNS; i += GRAD_THREADS) {
            const int r = i / LAST_COLUMNS, k = i % LAST_COLUMNS;
            float v = 0.f;
            for (int m = 0; m < p.M; ++m) v += dh[m * R + r] * xs[m][k];
            put_number(p.da, (size_t)r * p.K + k0 + k, v, p.a32);
        }
}

}  // namespace few
}  // namespace lora_kernels
