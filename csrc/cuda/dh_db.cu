#include "entry.cuh"

namespace lora_kernels {
namespace cuda {

Slices dh_db_slices(DType compute, int64_t rows, int64_t columns) {
    if (compute == DType::DOUBLE) return DhDb<double>::slices(rows, columns);
    if (compute == DType::HALF) return DhDb<Half>::slices(rows, columns);
    return compute == DType::FLOAT ? DhDb<float>::slices(rows, columns) : DhDb<BFloat16>::slices(rows, columns);
}

int64_t dh_db_tiles(DType compute, int64_t columns) {
    if (compute == DType::DOUBLE) return DhDb<double>::tiles(columns);
    if (compute == DType::HALF) return DhDb<Half>::tiles(columns);
    return compute == DType::FLOAT ? DhDb<float>::tiles(columns) : DhDb<BFloat16>::tiles(columns);
}

void launch_dh_db(DType compute, const DhDbArgs& args, cudaStream_t stream) {
    if (compute == DType::HALF) launch<DhDb<Half>>(args, stream);
    if (compute == DType::BFLOAT16) launch<DhDb<BFloat16>>(args, stream);
    if (compute == DType::FLOAT) launch<DhDb<float>>(args, stream);
    if (compute == DType::DOUBLE) launch<DhDb<double>>(args, stream);
}

}  // namespace cuda
}  // namespace lora_kernels
