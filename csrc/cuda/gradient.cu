#include "entry.cuh"

namespace lora_kernels {
namespace cuda {

namespace {

template <typename T>
void launch_for(const GradientArgs& args, bool small, cudaStream_t stream) {
    if (small) {
        launch<Gradient<T, SMALL_RANKS>>(args, stream);
    } else {
        launch<Gradient<T, LARGE_RANKS>>(args, stream);
    }
}

template <typename T>
Slices slices_for(int64_t rows, int64_t columns, int64_t ranks, bool small) {
    return small ? Gradient<T, SMALL_RANKS>::slices(rows, columns, ranks)
                 : Gradient<T, LARGE_RANKS>::slices(rows, columns, ranks);
}

}  // namespace

Slices gradient_slices(DType compute, int64_t rows, int64_t columns, int64_t ranks) {
    const bool small = takes_small(compute, ranks);
    if (compute == DType::DOUBLE) return Gradient<double, SMALL_RANKS>::slices(rows, columns, ranks);
    if (compute == DType::HALF) return slices_for<Half>(rows, columns, ranks, small);
    return compute == DType::FLOAT ? slices_for<float>(rows, columns, ranks, small)
                                   : slices_for<BFloat16>(rows, columns, ranks, small);
}

void launch_gradient(DType compute, const GradientArgs& args, cudaStream_t stream) {
    const bool small = takes_small(compute, args.hidden.rows);
    if (compute == DType::HALF) launch_for<Half>(args, small, stream);
    if (compute == DType::BFLOAT16) launch_for<BFloat16>(args, small, stream);
    if (compute == DType::FLOAT) launch_for<float>(args, small, stream);
    if (compute == DType::DOUBLE) launch<Gradient<double, SMALL_RANKS>>(args, stream);
}

}  // namespace cuda
}  // namespace lora_kernels
