// y (M, N) = x (M, K) Wᵀ + bias + s h Bᵀ with h = (D * x) Aᵀ (M, R), for M <= 16, in one launch that reads W once.
//
//   x      bf16 (M, K), rows of `ldx` numbers, 16-byte aligned      A    bf16 or fp32 (R, K), in one piece, 16-byte
//   aligned W      bf16 (N, K), in one piece, 16-byte aligned               B    bf16 or fp32 (N, R), in one piece bias
//   bf16 (N), or null                                        y    bf16 (M, N), in one piece words  the packed mask
//   (packed_mask.py), or null                h    fp32 (M, R), or the operand (hidden_operand.py)
//
// K is a multiple of 64, R at most 64. A is rounded to bf16 at its product; everything is summed in fp32. Flops 2 M N K
// + 2 M R (N + K); bytes: W, A, B, and x from L2 for each tile of W.
//
// Blocks [0, hc) form parts of h over slices of K and publish them by flags. The other blocks walk tiles of 16 MT rows
// of W: NW warps divide K of each tile and stream W and x through rings of their own, without a barrier of the block;
// HW helper warps meanwhile take s h Bᵀ + bias, then sum the warps' accumulators in a fixed order and write y. Clusters
// of `ks` blocks split K of one tile. The flags hold the number of the launch, so nothing has to be cleared between
// two; the memory of `count`, `flag` and `part` begins as zeros and serves one launch after the other, on one stream.
#pragma once

#ifndef LORA_FEW_TOKENS_ON_HOST
#include "few_tokens_device.cuh"
#endif

namespace lora_kernels {
namespace few {

constexpr int HW = 4, RMAX = 64, MAX_PRODUCERS = 32, PART = 16 * RMAX;
constexpr int FLAG_OFFSET = 64, PART_OFFSET = 1024;  // bytes, in the workspace

struct Params {
    const bf16* x;
    const bf16* W;
    const void* A;
    const void* B;
    const bf16* bias;
    const unsigned* words;
    bf16* y;
    void* h;
    float* part;
    unsigned* flag;
    unsigned long long* count;
    int M, N, K, R, ldx, row_words, rank;  // rank: of h's operand; 0: h is fp32
    int a32, b32, hc, ks, tiles, ctas, pdl;
    float s, keep;  // keep: 1 / (1 - p)
};

enum { COPIES = 0, REGISTERS = 1 };  // where a warp's ring lies: shared memory by cp.async, or registers

// RAGGED: N is no multiple of a tile's rows; rows that are not there are read as the last one and not written.
template <int MT_, int NT_, int NW_, int D_, int L_, bool RAGGED_>
struct Config {
    static constexpr int MT = MT_, NT = NT_, NW = NW_, D = D_, LOAD = L_;
    static constexpr bool RAGGED = RAGGED_;
    static constexpr int ROWS = 16 * MT, TOK = 8 * NT, LDR = ROWS + 4, THREADS = (NW + HW) * 32, F = 4 * MT + 2 * NT;
    static constexpr int BLOCKS = MT == 1 && NW == 8 && NT == 1 && !(LOAD == REGISTERS && D > 2) ? 2 : 1;  // an SM
    static constexpr int SLOT = 512 * F, RED = TOK * LDR;  // bytes of a ring's slot; floats of one warp's tile
    static constexpr int RING = LOAD == REGISTERS ? 0 : NW * D * SLOT;
    static constexpr int PRODUCE = (NW + HW) * TOK * 20 * 4;  // what a block that forms h needs: over ring and sums
    static constexpr int BODY = RING + 2 * NW * RED * 4 > PRODUCE ? RING + 2 * NW * RED * 4 : PRODUCE;
    static constexpr int HS = BODY, BS = HS + TOK * RMAX * 4, SUM = BS + ROWS * (RMAX + 1) * 4;
    static constexpr int TAG = (SUM + RED * 4 + 15) / 16 * 16;
    static constexpr int SHARED = TAG + 16;
};

// 16 rows x 32 k: lo = row g, hi = row g + 8, x = token g; each lane has 8 consecutive k, the same ones in all operands
__device__ __forceinline__ void mma32(float (&c)[4], const uint4& lo, const uint4& hi, const uint4& x) {
    mma(c, lo.x, hi.x, lo.y, hi.y, x.x, x.y);
    mma(c, lo.z, hi.z, lo.w, hi.w, x.z, x.w);
}

// Two numbers of x, of which the two lowest bits say which are kept.
__device__ __forceinline__ uint32_t kept2(uint32_t two, unsigned bits) {
    return two & ((bits & 1 ? 0xFFFFu : 0u) | (bits & 2 ? 0xFFFF0000u : 0u));
}
// D * x of 8 consecutive columns: a byte of the mask
__device__ __forceinline__ uint4 kept8(const Params& p, uint4 v, int m, int k) {
    const unsigned bits = p.words[(size_t)m * p.row_words + k / 32] >> (k % 32);
    return make_uint4(kept2(v.x, bits), kept2(v.y, bits >> 2), kept2(v.z, bits >> 4), kept2(v.w, bits >> 6));
}
__device__ __forceinline__ uint4 x8(const Params& p, int m, int k) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (m < p.M) {
        v = ldg16(p.x + (size_t)m * p.ldx + k);
        if (p.words) v = kept8(p, v, m, k);
    }
    return v;
}

__device__ __forceinline__ uint4 round8(const float* a) {
    const float4 u = *(const float4*)a, v = *(const float4*)(a + 4);
    return make_uint4(pack2(u.x, u.y), pack2(u.z, u.w), pack2(v.x, v.y), pack2(v.z, v.w));
}

// A part of h: this block's slice of K.
template <class C>
__device__ void produce(const Params& p, float* red, const volatile unsigned* tag) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, nw = C::NW + HW;
    const int nch = p.K / 64, c0 = (int)((long long)blockIdx.x * nch / p.hc);
    const int c1 = (int)((long long)(blockIdx.x + 1) * nch / p.hc);
    float* out = p.part + (size_t)blockIdx.x * PART;
    for (int r0 = 0; r0 < p.R; r0 += 16) {
        const size_t ra = (size_t)min(r0 + g, p.R - 1) * p.K, rb = (size_t)min(r0 + g + 8, p.R - 1) * p.K;
        float acc[C::NT][4] = {};
#pragma unroll 2
        for (int i = c0 + warp; i < c1; i += nw) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int k = i * 64 + half * 32 + t * 8;
                uint4 lo, hi;
                if (p.a32) {
                    lo = round8((const float*)p.A + ra + k);
                    hi = round8((const float*)p.A + rb + k);
                } else {
                    lo = ldg16((const bf16*)p.A + ra + k);
                    hi = ldg16((const bf16*)p.A + rb + k);
                }
#pragma unroll
                for (int nt = 0; nt < C::NT; ++nt) mma32(acc[nt], lo, hi, x8(p, nt * 8 + g, k));
            }
        }
#pragma unroll
        for (int nt = 0; nt < C::NT; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                red[(warp * C::TOK + nt * 8 + 2 * t + (e & 1)) * 20 + g + 8 * (e >> 1)] = acc[nt][e];
        __syncthreads();
        for (int i = threadIdx.x; i < p.M * 16; i += C::THREADS) {
            const int m = i / 16, r = i % 16;
            float v = 0.f;
            for (int w = 0; w < nw; ++w) v += red[(w * C::TOK + m) * 20 + r];
            if (r0 + r < p.R) out[m * p.R + r0 + r] = v;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        fence();
        st_release(p.flag + blockIdx.x, *tag);
    }
}

// This launch's number: each block counts itself, and one of them closes the count.
__device__ __forceinline__ unsigned launch_number(const Params& p, bool closes) {
    const unsigned long long one = 1ull << 20;
    return (unsigned)(count_up(p.count, closes ? one - (gridDim.x - 1) : 1ull) >> 20) + 1;
}

// h's operand: s h as a high and a low part, ranks that are not there as zeros.
__device__ __forceinline__ void write_operand(const Params& p, const float* hs, int first, int step) {
    bf16* h = (bf16*)p.h;
    for (int i = first; i < p.M * p.rank; i += step) {
        const int m = i / p.rank, c = i - m * p.rank;
        const float v = c < p.R ? p.s * hs[m * p.R + c] : 0.f;
        const bf16 high = narrow(v);
        const float rest = v - widen(high);
        h[m * 2 * p.rank + c] = high;
        h[m * 2 * p.rank + p.rank + c] = narrow(rest - rest == 0.f ? rest : 0.f);
    }
}

template <class C>
__device__ __forceinline__ const bf16* row_of(const Params& p, int row) {
    return p.W + (size_t)(C::RAGGED ? min(row, p.N - 1) : row) * p.K;
}

// What a warp fetches next: its chunks of 64 k, tile after tile.
template <class C>
struct Chunks {
    int row, chunk, first, count, step;
    __device__ __forceinline__ void next() {
        chunk += C::NW;
        if (chunk >= count) {
            chunk = first;
            row += step;
        }
    }
};

template <class C>
__device__ __forceinline__ void stream(const Params& p, char* sm, float* red, int cta, int k0, int nch, int per,
                                       int mine) {
    constexpr int MT = C::MT, NT = C::NT, NW = C::NW, D = C::D, F = C::F, RED = C::RED, LDR = C::LDR;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int total = per * mine;
    float acc[MT][NT][4] = {};
    int ti = 0, ci = 0;  // what is consumed next
    auto flush = [&]() {
        const int buf = ti & 1;
        if (ti >= 2) bar_sync(3 + buf, C::THREADS);
        float* o = red + (buf * NW + warp) * RED;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    o[(nt * 8 + 2 * t + (e & 1)) * LDR + mt * 16 + g + 8 * (e >> 1)] = acc[mt][nt][e];
                    acc[mt][nt][e] = 0.f;
                }
        bar_arrive(1 + buf, C::THREADS);
        ++ti;
        ci = 0;
    };
    auto consume = [&](const uint4(&f)[F]) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                for (int mt = 0; mt < MT; ++mt)
                    mma32(acc[mt][nt], f[mt * 4 + half * 2], f[mt * 4 + half * 2 + 1], f[4 * MT + nt * 2 + half]);
        if (++ci == per) flush();
    };
    Chunks<C> at{cta * C::ROWS, warp, warp, nch, p.ctas * C::ROWS};
    if constexpr (C::LOAD == COPIES) {
        const uint32_t ring = shared_address(sm) + warp * D * C::SLOT + lane * 16;
        auto issue = [&](int d) {
            const int k = k0 + at.chunk * 64 + t * 8;
            const uint32_t s = ring + d * C::SLOT;
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                const bf16* w = row_of<C>(p, at.row + mt * 16 + g) + k;
                const bf16* w8 = row_of<C>(p, at.row + mt * 16 + g + 8) + k;
                cp16(s + (mt * 4 + 0) * 512, w);
                cp16(s + (mt * 4 + 2) * 512, w + 32);
                cp16(s + (mt * 4 + 1) * 512, w8);
                cp16(s + (mt * 4 + 3) * 512, w8 + 32);
            }
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                const int m = nt * 8 + g;
                const bool there = m < p.M;
                const bf16* x = p.x + (there ? (size_t)m * p.ldx : 0) + k;
                cp16z(s + (4 * MT + nt * 2) * 512, x, there);
                cp16z(s + (4 * MT + nt * 2 + 1) * 512, x + 32, there);
            }
            at.next();
        };
        for (int d = 0; d < D; ++d) {
            if (d < total) issue(d);
            cp_commit();
        }
        int d = 0;
        for (int it = 0; it < total; ++it) {
            cp_wait<D - 1>();
            uint4 f[F];
#pragma unroll
            for (int q = 0; q < F; ++q) f[q] = lds16(ring + d * C::SLOT + q * 512);
            consume(f);  // before the slot is asked for again
            if (it + D < total) issue(d);
            cp_commit();
            d = d + 1 == D ? 0 : d + 1;
        }
    } else {
        uint4 f[D][F];
        auto issue = [&](uint4(&f)[F]) {
            const int k = k0 + at.chunk * 64 + t * 8;
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                const bf16* w = row_of<C>(p, at.row + mt * 16 + g) + k;
                const bf16* w8 = row_of<C>(p, at.row + mt * 16 + g + 8) + k;
                f[mt * 4 + 0] = ldg_stream(w);
                f[mt * 4 + 2] = ldg_stream(w + 32);
                f[mt * 4 + 1] = ldg_stream(w8);
                f[mt * 4 + 3] = ldg_stream(w8 + 32);
            }
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int m = nt * 8 + g;
                    uint4 v = make_uint4(0, 0, 0, 0);
                    if (m < p.M) v = ldg16(p.x + (size_t)m * p.ldx + k + half * 32);
                    f[4 * MT + nt * 2 + half] = v;
                }
            at.next();
        };
#pragma unroll
        for (int d = 0; d < D; ++d)
            if (d < total) issue(f[d]);
        for (int it = 0; it < total; it += D) {
#pragma unroll
            for (int d = 0; d < D; ++d)
                if (it + d < total) {
                    consume(f[d]);
                    if (it + d + D < total) issue(f[d]);
                }
        }
    }
    __syncwarp();  // the cluster's barriers are aligned
    if (p.ks > 1) {
        cluster_arrive();
        cluster_wait();
        cluster_arrive();
        cluster_wait();
    }
}

// The helper warps: s h Bᵀ + bias, the sums of the warps' accumulators, y.
template <class C>
__device__ __forceinline__ void finish(const Params& p, char* sm, const float* red, volatile unsigned* tag, int cta,
                                       int rank, int mine) {
    constexpr int NW = C::NW, RED = C::RED, LDR = C::LDR, OUT = C::ROWS * C::TOK / (HW * 32);
    const int hid = threadIdx.x - NW * 32;
    float *hs = (float*)(sm + C::HS), *Bs = (float*)(sm + C::BS), *sum = (float*)(sm + C::SUM);
    const int R = p.R, LB = R + 1;
    if (hid == 0) *tag = launch_number(p, false);
    for (int ti = 0; ti < mine; ++ti) {
        const int n0 = (cta + ti * p.ctas) * C::ROWS, buf = ti & 1, rows = C::RAGGED ? min(C::ROWS, p.N - n0) : C::ROWS;
        if (rank == 0)
            for (int i = hid; i < rows * R; i += HW * 32) {
                const int r = i / R, c = i - r * R;
                Bs[r * LB + c] =
                    p.b32 ? ((const float*)p.B)[(size_t)n0 * R + i] : widen(((const bf16*)p.B)[(size_t)n0 * R + i]);
            }
        if (ti == 0 && rank == 0) {
            bar_sync(5, HW * 32);  // tag is there
            if (hid < p.hc) {
                const unsigned want = *tag;
                while (ld_acquire(p.flag + hid) != want) pause();
            }
            bar_sync(5, HW * 32);
            for (int i = hid; i < p.M * R; i += HW * 32) {
                float v = 0.f;
                for (int q = 0; q < p.hc; ++q) v += ldg_l2(p.part + (size_t)q * PART + i);
                v *= p.keep;
                hs[i] = v;
                if (cta == 0 && p.rank == 0) ((float*)p.h)[i] = v;
            }
        }
        bar_sync(5, HW * 32);  // hs, Bs
        if (ti == 0 && rank == 0 && cta == 0 && p.rank) write_operand(p, hs, hid, HW * 32);
        float low[OUT];
#pragma unroll
        for (int j = 0; j < OUT; ++j) {
            const int i = hid + j * HW * 32, r = i % C::ROWS, m = i / C::ROWS;
            float v = 0.f;
            if (rank == 0 && m < p.M && (!C::RAGGED || r < rows)) {
                for (int c = 0; c < R; ++c) v += hs[m * R + c] * Bs[r * LB + c];
                v *= p.s;
                if (p.bias) v += widen(p.bias[n0 + r]);
            }
            low[j] = v;
        }
        bar_sync(1 + buf, C::THREADS);
        const float* o = red + buf * NW * RED;
#pragma unroll
        for (int j = 0; j < OUT; ++j) {
            const int i = hid + j * HW * 32, r = i % C::ROWS, m = i / C::ROWS;
            if (m < p.M && (!C::RAGGED || r < rows)) {
                float v = 0.f;
#pragma unroll
                for (int w = 0; w < NW; ++w) v += o[w * RED + m * LDR + r];
                v += low[j];
                if (p.ks == 1)
                    p.y[(size_t)m * p.N + n0 + r] = narrow(v);
                else
                    sum[m * LDR + r] = v;
            }
        }
        if (ti + 2 < mine) bar_arrive(3 + buf, C::THREADS);
        if (ti + 1 < mine) bar_sync(5, HW * 32);  // before Bs is written again
    }
    __syncwarp();
    if (p.ks > 1) {  // one tile: the ranks' sums, each rank writes a part of it
        cluster_arrive();
        cluster_wait();
        const int n0 = cta * C::ROWS, total = C::ROWS * p.M;
        for (int i = hid + rank * HW * 32; i < total; i += p.ks * HW * 32) {
            const int r = i % C::ROWS, m = i / C::ROWS;
            if (C::RAGGED && n0 + r >= p.N) continue;
            float v = 0.f;
            for (int q = 0; q < p.ks; ++q) v += ld_cluster(shared_address(sum + m * LDR + r), q);
            p.y[(size_t)m * p.N + n0 + r] = narrow(v);
        }
        __syncwarp();
        cluster_arrive();
        cluster_wait();
    }
}

template <class C>
__device__ __forceinline__ void forward(const Params& p) {
    LORA_SHARED_MEMORY(sm);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    volatile unsigned* tag = (volatile unsigned*)(sm + C::TAG);
    const bool producer = (int)blockIdx.x < p.hc;
    const int cta = ((int)blockIdx.x - p.hc) / p.ks, rank = ((int)blockIdx.x - p.hc) % p.ks;  // ks divides hc
    const int nch = p.K / 64 / p.ks, k0 = rank * nch * 64;  // this block's slice of K; ks divides K / 64
    const int mine = producer ? 0 : (p.tiles - cta + p.ctas - 1) / p.ctas;  // tiles cta, cta + ctas, ...
    const int per = warp < C::NW ? (nch - warp + C::NW - 1) / C::NW : 0;    // chunks of a warp in a tile: every NW-th
    if (p.pdl) {
        if (!producer && warp < C::NW) {  // a hint to L2 alone: it may run before what wrote W has ended
            for (int d = 0; d < C::D && d < per; ++d)
                for (int r = lane; r < C::ROWS; r += 32)
                    prefetch_l2(row_of<C>(p, cta * C::ROWS + r) + k0 + (warp + d * C::NW) * 64);
        }
        grid_wait();
        grid_launch_dependents();
    }
    if (producer) {
        if (threadIdx.x == 0) *tag = launch_number(p, blockIdx.x == 0);
        produce<C>(p, (float*)sm, tag);
        return;
    }
    float* red = (float*)(sm + C::RING);
    if (warp < C::NW)
        stream<C>(p, sm, red, cta, k0, nch, per, mine);
    else
        finish<C>(p, sm, red, tag, cta, rank, mine);
}

}  // namespace few
}  // namespace lora_kernels
