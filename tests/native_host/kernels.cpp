// The CUDA kernels' bodies on the host, for tests/backends/native/test_cuda_kernels.py: the same source, block after
// block, with shared memory full of NaN at the start.
#include "../../csrc/cuda/dh_db.h"
#include "../../csrc/cuda/elementwise.h"
#include "../../csrc/cuda/expand.h"
#include "../../csrc/cuda/gradient.h"
#include "../../csrc/cuda/shrink.h"
#include "warp.h"

using namespace lora_kernels::cuda;

namespace {

template <class Kernel>
void run(const typename Kernel::Args& args, bool downwards) {
    std::unique_ptr<typename Kernel::Shared> shared(new typename Kernel::Shared);
    for (int64_t block = 0; block < Kernel::blocks(args); ++block) {
        memset(static_cast<void*>(shared.get()), 0xFF, sizeof(*shared));
        HostBlock(downwards, [&](HostWarp& warp) { Kernel::run(warp, *shared, args, block); }).run();
    }
}

// Calls `function` with a number of the compute dtype. LORA_ONLY_HALF: the others are left out, to compile sooner.
template <class F>
auto with_compute(DType compute, F function) {
#if defined(LORA_ONLY_HALF)
    if (compute != DType::HALF) abort();
    return function(Half{});
#else
    switch (compute) {
        case DType::HALF:
            return function(Half{});
        case DType::BFLOAT16:
            return function(BFloat16{});
        case DType::FLOAT:
            return function(float{});
        default:
            return function(double{});
    }
#endif
}

}  // namespace

extern "C" {

void lora_mask(const int64_t* seed, uint32_t keep_of_65536, bool* keep, int64_t rows, int64_t columns, bool downwards) {
    run<Mask>({{seed, keep_of_65536}, keep, rows, columns}, downwards);
}

int64_t lora_slices(int kernel, DType compute, int64_t rows, int64_t columns, int64_t ranks, bool small,
                    int64_t* length) {
    const Slices slices = with_compute(compute, [&](auto t) {
        using T = decltype(t);
        if (kernel == 0) {
            return small ? Shrink<T, 16>::slices(rows, columns, ranks) : Shrink<T, 64>::slices(rows, columns, ranks);
        }
        if (kernel == 1) {
            return small ? Gradient<T, 16>::slices(rows, columns, ranks)
                         : Gradient<T, 64>::slices(rows, columns, ranks);
        }
        return kernel == 2 ? DhDb<T>::slices(rows, columns) : ColumnSum<T>::slices(rows, columns);
    });
    *length = slices.length;
    return slices.count;
}

int64_t lora_dh_db_tiles(DType compute, int64_t columns) {
    return with_compute(compute, [&](auto t) { return DhDb<decltype(t)>::tiles(columns); });
}

void lora_shrink(DType compute, const ShrinkArgs* args, bool small, bool downwards) {
    with_compute(compute, [&](auto t) {
        using T = decltype(t);
        small ? run<Shrink<T, 16>>(*args, downwards) : run<Shrink<T, 64>>(*args, downwards);
    });
}

void lora_gradient(DType compute, const GradientArgs* args, bool small, bool downwards) {
    with_compute(compute, [&](auto t) {
        using T = decltype(t);
        small ? run<Gradient<T, 16>>(*args, downwards) : run<Gradient<T, 64>>(*args, downwards);
    });
}

void lora_expand(DType compute, const ExpandArgs* args, bool downwards) {
    with_compute(compute, [&](auto t) { run<Expand<decltype(t)>>(*args, downwards); });
}

void lora_dh_db(DType compute, const DhDbArgs* args, bool downwards) {
    with_compute(compute, [&](auto t) { run<DhDb<decltype(t)>>(*args, downwards); });
}

void lora_column_sum(DType compute, const ColumnSumArgs* args, bool downwards) {
    with_compute(compute, [&](auto t) { run<ColumnSum<decltype(t)>>(*args, downwards); });
}

void lora_reduce(DType compute, const ReduceArgs* args, bool downwards) {
    compute == DType::DOUBLE ? run<Reduce<double>>(*args, downwards) : run<Reduce<float>>(*args, downwards);
}

void lora_convert(DType from, DType to, const void* in, void* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) store_as(out, to, i, load_as<float>(in, from, i));
}
}
