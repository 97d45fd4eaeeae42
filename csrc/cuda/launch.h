// The kernels' host side: one function a kernel, which picks the instance and launches it on a stream. No torch here.
#pragma once

#include <cuda_runtime.h>

#include "dh_db.h"
#include "elementwise.h"
#include "expand.h"
#include "gradient.h"
#include "shrink.h"

namespace lora_kernels {
namespace cuda {

// Ranks that one block takes: small adapters are padded to SMALL_RANKS, others go in groups of LARGE_RANKS. fp64 serves
// gradcheck: it has the small instance only.
constexpr int SMALL_RANKS = 16, LARGE_RANKS = 64;
inline bool takes_small(DType compute, int64_t ranks) { return ranks <= SMALL_RANKS || compute == DType::DOUBLE; }

// How a kernel will divide its sum, so that the caller can allocate the parts.
Slices shrink_slices(DType compute, int64_t rows, int64_t columns, int64_t ranks);
Slices gradient_slices(DType compute, int64_t rows, int64_t columns, int64_t ranks);
Slices dh_db_slices(DType compute, int64_t rows, int64_t columns);
int64_t dh_db_tiles(DType compute, int64_t columns);
Slices column_sum_slices(int64_t rows, int64_t columns);

void launch_shrink(DType compute, const ShrinkArgs& args, cudaStream_t stream);
void launch_gradient(DType compute, const GradientArgs& args, cudaStream_t stream);
void launch_expand(DType compute, const ExpandArgs& args, cudaStream_t stream);
void launch_dh_db(DType compute, const DhDbArgs& args, cudaStream_t stream);
void launch_reduce(DType compute, const ReduceArgs& args, cudaStream_t stream);
void launch_column_sum(DType compute, const ColumnSumArgs& args, cudaStream_t stream);
void launch_mask(const MaskArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace lora_kernels
