// The one __global__ function, and its launch: every kernel is a class with Args, Shared, blocks() and run().
#pragma once

#include "launch.h"
#include "warp.h"

namespace lora_kernels {
namespace cuda {

template <class Kernel>
__global__ void __launch_bounds__(THREADS) entry(const typename Kernel::Args args) {
    __shared__ typename Kernel::Shared shared;
    static_assert(sizeof(shared) <= 48 * 1024, "more shared memory than every device gives without asking");
    DeviceWarp warp;
    Kernel::run(warp, shared, args, static_cast<int64_t>(blockIdx.x));
}

// Errors of the launch are left for the caller's cudaGetLastError().
template <class Kernel>
void launch(const typename Kernel::Args& args, cudaStream_t stream) {
    const int64_t blocks = Kernel::blocks(args);
    if (blocks > 0) entry<Kernel><<<static_cast<unsigned int>(blocks), THREADS, 0, stream>>>(args);
}

}  // namespace cuda
}  // namespace lora_kernels
