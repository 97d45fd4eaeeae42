#include "entry.cuh"

namespace lora_kernels {
namespace cuda {

void launch_reduce(DType compute, const ReduceArgs& args, cudaStream_t stream) {
    if (compute == DType::DOUBLE) {
        launch<Reduce<double>>(args, stream);
    } else {
        launch<Reduce<float>>(args, stream);
    }
}

Slices column_sum_slices(int64_t rows, int64_t columns) { return ColumnSum<float>::slices(rows, columns); }

void launch_column_sum(DType compute, const ColumnSumArgs& args, cudaStream_t stream) {
    if (compute == DType::HALF) launch<ColumnSum<Half>>(args, stream);
    if (compute == DType::BFLOAT16) launch<ColumnSum<BFloat16>>(args, stream);
    if (compute == DType::FLOAT) launch<ColumnSum<float>>(args, stream);
    if (compute == DType::DOUBLE) launch<ColumnSum<double>>(args, stream);
}

void launch_mask(const MaskArgs& args, cudaStream_t stream) { launch<Mask>(args, stream); }

}  // namespace cuda
}  // namespace lora_kernels
