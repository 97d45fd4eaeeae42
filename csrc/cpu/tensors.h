// Torch tensors through the stable ABI: what the operators need to know of them, and how they make them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <optional>

#include "kernels.h"

namespace lora_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return Dtype::fp32;
        case ScalarType::BFloat16:
            return Dtype::bf16;
        case ScalarType::Half:
            return Dtype::fp16;
        case ScalarType::Double:
            return Dtype::fp64;
        default:
            STD_TORCH_CHECK(false, name,
                            " has a dtype that LoRA does not run in: it must be float16, bfloat16, float32 or "
                            "float64. Convert it.");
    }
    return Dtype::fp32;
}

inline ScalarType scalar_type_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::fp32:
            return ScalarType::Float;
        case Dtype::bf16:
            return ScalarType::BFloat16;
        case Dtype::fp16:
            return ScalarType::Half;
        case Dtype::fp64:
            return ScalarType::Double;
    }
    return ScalarType::Float;
}

inline size_t size_of(Dtype dtype) { return dtype == Dtype::fp64 ? 8 : dtype == Dtype::fp32 ? 4 : 2; }

inline Dtype hidden_of(Dtype compute) { return compute == Dtype::fp64 ? Dtype::fp64 : Dtype::fp32; }

// What lora_a and lora_b are rounded to: fp16's range is too small for them (lora_kernels/reference.py, adapter_dtype).
inline Dtype adapter_of(Dtype compute) { return compute == Dtype::fp16 ? Dtype::fp32 : compute; }

// A fresh contiguous CPU tensor of at most three dimensions.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
    int64_t strides[3] = {1, 1, 1}, step = 1;
    const int64_t dims = static_cast<int64_t>(sizes.size());
    for (int64_t i = dims - 1; i >= 0; --i) {
        strides[i] = step;
        step *= sizes.begin()[i] > 1 ? sizes.begin()[i] : 1;
    }
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        dims, sizes.begin(), strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

// A matrix with unit column stride: the tensor itself, or a contiguous copy where its columns are strided.
struct Matrix {
    Tensor tensor;
    const void* data;
    int64_t rows, columns, stride;

    Matrix(const Tensor& source, const char* name) : tensor(source) {
        STD_TORCH_CHECK(source.dim() == 2, name, " must be a matrix, and it has ", source.dim(), " dimensions.");
        const auto sizes = source.sizes();
        rows = sizes[0], columns = sizes[1];
        if (columns > 1 && source.stride(1) != 1) tensor = torch::stable::contiguous(source);
        stride = tensor.stride(0);
        data = tensor.const_data_ptr();
    }
};

// Memory for one call, 64-byte aligned: a little of its own, for one token's call is over before torch's allocator
// would have answered, and else from that, where its profilers see it. Nothing is allocated inside a parallel region.
class Scratch {
  public:
    explicit Scratch(size_t bytes) {
        if (bytes > sizeof near_) memory_.emplace(empty({static_cast<int64_t>(bytes)}, ScalarType::Byte));
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* get() { return memory_.has_value() ? memory_->mutable_data_ptr() : near_; }

  private:
    std::optional<Tensor> memory_;
    alignas(64) unsigned char near_[4096];
};

}  // namespace lora_kernels
