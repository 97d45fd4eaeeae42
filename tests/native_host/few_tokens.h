// csrc/cuda/few_tokens_device.cuh, played on the host: every CUDA thread is a coroutine, the threads of a cluster's
// blocks take turns between barriers, upwards or downwards, so that a missing barrier shows. Asynchronous copies happen
// at cp_wait, as late as the device may do them; shared memory begins as NaN. The tensor core is the PTX manual's
// table.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define LORA_FEW_TOKENS_ON_HOST
#define __device__
#define __forceinline__ inline
#define LORA_SHARED_MEMORY(name) char* name = current().block->shared.data()

struct uint4 {
    uint32_t x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
struct Index {
    unsigned x;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
using std::min;

namespace lora_kernels {
namespace few {

struct Barrier {
    int count = 0, generation = 0;
    void arrive(int of) {
        if (++count == of) count = 0, ++generation;
    }
};
struct Warp {
    Barrier barrier;
    uint32_t a[32][4], b[32][2];
};
struct Block {
    std::vector<char> shared;
    Barrier barriers[16];
    Warp warps[32];
    std::vector<Block*>* cluster;
    Barrier* cluster_barrier;
    int threads;
};
struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Block* block;
    unsigned thread, index, grid;
    int cluster_generation = 0;
    bool done = false;
    std::vector<std::function<void()>> open;
    std::deque<std::vector<std::function<void()>>> groups;
    std::function<void()> body;
};

inline Thread*& current_thread() {
    static Thread* now = nullptr;
    return now;
}
inline Thread& current() { return *current_thread(); }
inline ucontext_t& scheduler() {
    static ucontext_t context;
    return context;
}
inline void yield() {
    Thread& self = current();
    swapcontext(&self.context, &scheduler());
}

#define threadIdx (Index{current().thread})
#define blockIdx (Index{current().index})
#define gridDim (Index{current().grid})

struct bf16 {
    uint16_t bits;
};
inline float widen(bf16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline bf16 narrow(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (std::isnan(v)) return {0x7FFF};
    return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}
inline uint32_t pack2(float a, float b) { return narrow(a).bits | static_cast<uint32_t>(narrow(b).bits) << 16; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return out;
}

inline void wait_at(Barrier& barrier, int of) {
    const int generation = barrier.generation;
    barrier.arrive(of);
    while (barrier.generation == generation) yield();
}
inline Warp& warp_of() { return current().block->warps[threadIdx.x / 32]; }
inline void __syncwarp() { wait_at(warp_of().barrier, 32); }
inline void __syncthreads() { wait_at(current().block->barriers[0], current().block->threads); }
inline void bar_sync(int id, int n) { wait_at(current().block->barriers[id], n); }
inline void bar_arrive(int id, int n) { current().block->barriers[id].arrive(n); }

inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const char*>(p) - current().block->shared.data());
}
inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    Warp& warp = warp_of();
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    std::memcpy(warp.a[lane], a, sizeof a);
    std::memcpy(warp.b[lane], b, sizeof b);
    __syncwarp();
    for (int e = 0; e < 4; ++e) {
        const int row = g + 8 * (e >> 1), column = 2 * t + (e & 1);
        for (int k = 0; k < 16; ++k) {
            const uint32_t left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
            const uint32_t right = warp.b[column * 4 + k % 8 / 2][k / 8];
            c[e] += widen({static_cast<uint16_t>(left >> 16 * (k & 1))}) *
                    widen({static_cast<uint16_t>(right >> 16 * (k & 1))});
        }
    }
    __syncwarp();
}

inline void cp16z(uint32_t to, const void* from, bool there) {
    if (to % 16 || (there && reinterpret_cast<uintptr_t>(from) % 16)) abort();
    char* at = current().block->shared.data() + to;
    current().open.push_back([=] { there ? std::memcpy(at, from, 16) : std::memset(at, 0, 16); });
}
inline void cp16(uint32_t to, const void* from) { cp16z(to, from, true); }
inline void cp_commit() {
    current().groups.push_back(std::move(current().open));
    current().open.clear();
}
template <int N>
inline void cp_wait() {
    for (auto& groups = current().groups; static_cast<int>(groups.size()) > N; groups.pop_front()) {
        for (auto& copy : groups.front()) copy();
    }
}
inline uint4 piece(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16) abort();
    uint4 v;
    std::memcpy(&v, p, 16);
    return v;
}
inline uint4 lds16(uint32_t at) {
    if (at % 16) abort();
    uint4 v;
    std::memcpy(&v, current().block->shared.data() + at, 16);
    return v;
}
inline uint4 ldg_stream(const void* p) { return piece(p); }
inline uint4 ldg16(const void* p) { return piece(p); }
inline float ldg_l2(const float* p) { return *p; }
inline unsigned ld_acquire(const unsigned* p) { return *p; }
inline void st_release(unsigned* p, unsigned v) { *p = v; }
inline unsigned long long count_up(unsigned long long* p, unsigned long long by) {
    const unsigned long long before = *p;
    *p += by;
    return before;
}
inline void fence() {}
inline void pause() { yield(); }
inline void prefetch_l2(const void* p) { static_cast<void>(*static_cast<const volatile char*>(p)); }
inline void cluster_arrive() {
    Thread& self = current();
    self.cluster_generation = self.block->cluster_barrier->generation;
    self.block->cluster_barrier->arrive(static_cast<int>(self.block->cluster->size()) * self.block->threads);
}
inline void cluster_wait() {
    while (current().block->cluster_barrier->generation == current().cluster_generation) yield();
}
inline float ld_cluster(uint32_t at, uint32_t rank) {
    float v;
    std::memcpy(&v, (*current().block->cluster)[rank]->shared.data() + at, 4);
    return v;
}
inline void grid_wait() {}
inline void grid_launch_dependents() {}

// Runs `body` in every thread of the grid, cluster after cluster. Returns whether every thread ended and every barrier
// was left empty.
inline bool run_grid(int grid, int threads, int shared_bytes, int cluster, bool downwards,
                     const std::function<void()>& body) {
    constexpr size_t STACK = 64 << 10;
    static const auto start = [] {
        current().body();
        current().done = true;
        yield();
    };
    for (int first = 0; first < grid; first += cluster) {
        std::vector<Block> blocks(cluster);
        std::vector<Block*> all;
        Barrier between;
        for (Block& block : blocks) {
            block.shared.assign(shared_bytes + 16, static_cast<char>(0xFF));
            block.cluster = &all, block.cluster_barrier = &between, block.threads = threads;
            all.push_back(&block);
        }
        std::vector<Thread> each(static_cast<size_t>(cluster) * threads);
        for (size_t i = 0; i < each.size(); ++i) {
            Thread& t = each[i];
            t.block = &blocks[i / threads], t.thread = i % threads, t.index = first + i / threads, t.grid = grid;
            t.body = body, t.stack.reset(new char[STACK]);
            getcontext(&t.context);
            t.context.uc_stack.ss_sp = t.stack.get(), t.context.uc_stack.ss_size = STACK, t.context.uc_link = nullptr;
            makecontext(&t.context, +[] { start(); }, 0);
        }
        bool running = true;
        for (int turns = 0; running; ++turns) {
            if (turns > 1 << 14) return false;  // they wait for one another
            running = false;
            for (size_t i = 0; i < each.size(); ++i) {
                Thread& t = each[downwards ? each.size() - 1 - i : i];
                if (t.done) continue;
                current_thread() = &t;
                swapcontext(&scheduler(), &t.context);
                running = running || !t.done;
            }
        }
        for (const Block& block : blocks)
            for (const Barrier& barrier : block.barriers)
                if (barrier.count) return false;
        if (between.count) return false;
    }
    return true;
}

}  // namespace few
}  // namespace lora_kernels
