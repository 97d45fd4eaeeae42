// A warp as the kernels' bodies see it, on the device: each thread holds one lane. tests/native_host/warp.h has the
// same interface for a host that plays all 32 lanes, one warp of a block after the other.
#pragma once

#include <type_traits>

#include "product.h"

namespace lora_kernels {
namespace cuda {

class DeviceWarp {
  public:
    // What each lane keeps in registers.
    template <class State>
    class Lanes {
      public:
        __device__ __forceinline__ State& operator[](int) { return state_; }

      private:
        State state_;
    };

    __device__ __forceinline__ int index() const { return static_cast<int>(threadIdx.x) / WARP_LANES; }

    template <class F>
    __device__ __forceinline__ void each(F function) {
        function(static_cast<int>(threadIdx.x) % WARP_LANES);
    }

    __device__ __forceinline__ void barrier() { __syncthreads(); }

    // 16 bytes from global to shared memory, both aligned, complete after wait().
    __device__ __forceinline__ void copy16(void* shared, const void* global) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(shared)), "l"(global) : "memory");
    }
    __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    // Waits for this thread's copies, but for those of the last PENDING groups.
    template <int PENDING>
    __device__ __forceinline__ void wait() {
        asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
    }

    // COUNT 8 x 8 matrices of 16-bit numbers; lane l names the 16-byte row l % 8 of matrix l / 8.
    template <int COUNT, bool TRANSPOSED, class Fragment, class Address>
    __device__ __forceinline__ void load_matrices(Lanes<Fragment>& fragment, Address row_of_lane) {
        uint32_t* v = fragment[0].v;
        const uint32_t from = address(row_of_lane(static_cast<int>(threadIdx.x) % WARP_LANES));
        if constexpr (COUNT == 4 && !TRANSPOSED) {
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                         : "r"(from)
                         : "memory");
        } else if constexpr (COUNT == 2 && !TRANSPOSED) {
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                         : "=r"(v[0]), "=r"(v[1])
                         : "r"(from)
                         : "memory");
        } else {
            static_assert(COUNT == 2 && TRANSPOSED, "no kernel needs another form");
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                         : "=r"(v[0]), "=r"(v[1])
                         : "r"(from)
                         : "memory");
        }
    }

    template <typename T, class Sums, class A, class B>
    __device__ __forceinline__ void tensor_multiply(Lanes<Sums>& sums, int at, Lanes<A>& lanes_a, Lanes<B>& lanes_b) {
        float* c = sums[0].tile[at].v;
        const uint32_t *a = lanes_a[0].v, *b = lanes_b[0].v;
        if constexpr (std::is_same<T, Half>::value) {
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        } else {
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        }
    }

  private:
    __device__ static __forceinline__ uint32_t address(const void* shared) {
        return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    }
};
}  // namespace cuda
}  // namespace lora_kernels
