// csrc/cuda/warp.h's interface, played on the host: all 32 lanes of a warp at once, the warps of a block one after the
// other between barriers, upwards or downwards. So a missing barrier shows: the two orders differ, or one is wrong.
// Asynchronous copies happen at wait(), as late as the device may do them. The tensor core is a loop over the layout
// that the PTX manual gives, written here a second time on purpose.
#pragma once

#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/product.h"

namespace lora_kernels {
namespace cuda {

class HostWarp;

// Runs the warps of one block as coroutines.
class HostBlock {
  public:
    HostBlock(bool downwards, std::function<void(HostWarp&)> body) : downwards_(downwards), body_(std::move(body)) {}
    void run();
    bool downwards() const { return downwards_; }
    void yield(int warp) { swapcontext(&contexts_[warp], &main_); }

  private:
    static void start(unsigned int high, unsigned int low);

    bool downwards_;
    std::function<void(HostWarp&)> body_;
    ucontext_t main_, contexts_[WARPS];
    bool done_[WARPS] = {};
    int current_ = 0;
};

class HostWarp {
  public:
    template <class State>
    class Lanes {
      public:
        Lanes() : states_(WARP_LANES) { memset(states_.data(), 0xFF, WARP_LANES * sizeof(State)); }  // NaN till written
        State& operator[](int lane) { return states_[lane]; }

      private:
        std::vector<State> states_;
    };

    HostWarp(HostBlock& block, int index) : block_(block), index_(index) {}
    int index() const { return index_; }

    template <class F>
    void each(F function) {
        for (int i = 0; i < WARP_LANES; ++i) function(block_.downwards() ? WARP_LANES - 1 - i : i);
    }

    void barrier() { block_.yield(index_); }

    void copy16(void* shared, const void* global) {
        if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) abort();
        pending_.push_back({shared, global, group_});
    }
    void commit() { ++group_; }
    template <int PENDING>
    void wait() {
        for (; !pending_.empty() && pending_.front().group < group_ - PENDING; pending_.pop_front()) {
            memcpy(pending_.front().shared, pending_.front().global, 16);
        }
    }

    // Lane l of matrix i gets elements 2 (l % 4) and the next of row l / 4; of column l / 4 if TRANSPOSED.
    template <int COUNT, bool TRANSPOSED, class Fragment, class Address>
    void load_matrices(Lanes<Fragment>& fragment, Address row_of_lane) {
        for (int lane = 0; lane < WARP_LANES; ++lane) {
            for (int i = 0; i < COUNT; ++i) {
                uint32_t register_ = 0;
                for (int half = 0; half < 2; ++half) {
                    const int along = 2 * (lane % 4) + half, across = lane / 4;
                    const auto* row = row_of_lane(8 * i + (TRANSPOSED ? along : across));
                    if (reinterpret_cast<uintptr_t>(row) % 16) abort();
                    register_ |= static_cast<uint32_t>(row[TRANSPOSED ? across : along].bits) << (16 * half);
                }
                fragment[lane].v[i] = register_;
            }
        }
    }

    // m16n8k16. A: register i of lane l holds row l / 4 + 8 (i % 2), k = 2 (l % 4) + 8 (i / 2) and the next. B: column
    // l / 4, k = 2 (l % 4) + 8 i and the next. C: element i is row l / 4 + 8 (i / 2), column 2 (l % 4) + i % 2.
    template <typename T, class Sums, class A, class B>
    void tensor_multiply(Lanes<Sums>& sums, int at, Lanes<A>& a, Lanes<B>& b) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < WARP_LANES; ++lane) {
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < 4; ++i) {
                    left[lane / 4 + 8 * (i % 2)][2 * (lane % 4) + 8 * (i / 2) + half] = number<T>(a[lane].v[i], half);
                }
                for (int i = 0; i < 2; ++i)
                    right[2 * (lane % 4) + 8 * i + half][lane / 4] = number<T>(b[lane].v[i], half);
            }
        }
        for (int lane = 0; lane < WARP_LANES; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                for (int k = 0; k < 16; ++k) sums[lane].tile[at].v[i] += left[row][k] * right[k][column];
            }
        }
    }

  private:
    struct Copy {
        void* shared;
        const void* global;
        int group;
    };
    template <typename T>
    static float number(uint32_t register_, int half) {
        return widen(T{static_cast<uint16_t>(register_ >> (16 * half))});
    }

    HostBlock& block_;
    int index_;
    int group_ = 0;
    std::deque<Copy> pending_;
};

inline void HostBlock::start(unsigned int high, unsigned int low) {
    auto* block = reinterpret_cast<HostBlock*>((static_cast<uintptr_t>(high) << 32) | low);
    const int index = block->current_;
    {
        HostWarp warp(*block, index);
        block->body_(warp);
    }
    block->done_[index] = true;
}

inline void HostBlock::run() {
    constexpr size_t STACK = 1 << 18;
    std::unique_ptr<char[]> stacks(new char[WARPS * STACK]);
    const auto self = reinterpret_cast<uintptr_t>(this);
    for (int warp = 0; warp < WARPS; ++warp) {
        getcontext(&contexts_[warp]);
        contexts_[warp].uc_stack.ss_sp = stacks.get() + warp * STACK;
        contexts_[warp].uc_stack.ss_size = STACK;
        contexts_[warp].uc_link = &main_;
        makecontext(&contexts_[warp], reinterpret_cast<void (*)()>(start), 2, static_cast<unsigned int>(self >> 32),
                    static_cast<unsigned int>(self));
    }
    for (bool running = true; running;) {
        running = false;
        for (int turn = 0; turn < WARPS; ++turn) {
            current_ = downwards_ ? WARPS - 1 - turn : turn;
            if (done_[current_]) continue;
            swapcontext(&main_, &contexts_[current_]);
            running = running || !done_[current_];
        }
    }
}

}  // namespace cuda
}  // namespace lora_kernels
