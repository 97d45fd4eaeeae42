#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "pass.h"

namespace lora_kernels {
namespace launch {

using torch::stable::Tensor;

// Runs `pass` on the device's current stream: its results, or none where memory or one of PyTorch's products could not
// be had. Then nothing but the pass's own memory was written, and the caller runs it another way.
std::vector<Tensor> run(const Pass& pass, const std::optional<Tensor>* const* tensors, size_t tensor_count,
                        const double* numbers, size_t number_count);

// Whether a graph is being captured on the stream that `run` would take; also where the driver does not tell.
bool is_captured(const Pass& pass);

}  // namespace launch
}  // namespace lora_kernels
