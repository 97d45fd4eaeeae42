#include "entry.cuh"

namespace lora_kernels {
namespace cuda {

void launch_expand(DType compute, const ExpandArgs& args, cudaStream_t stream) {
    if (compute == DType::HALF) launch<Expand<Half>>(args, stream);
    if (compute == DType::BFLOAT16) launch<Expand<BFloat16>>(args, stream);
    if (compute == DType::FLOAT) launch<Expand<float>>(args, stream);
    if (compute == DType::DOUBLE) launch<Expand<double>>(args, stream);
}

}  // namespace cuda
}  // namespace lora_kernels
