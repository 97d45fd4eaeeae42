// The parts of a layer's forward and backward over torch tensors; operators.cpp and experts.cpp put them together.
#pragma once

#include "arguments.h"

namespace lora_kernels {

inline Tensor transposed(const Tensor& matrix) {
    const auto sizes = matrix.sizes();
    const auto strides = matrix.strides();
    const int64_t turned_sizes[2] = {sizes[1], sizes[0]}, turned_strides[2] = {strides[1], strides[0]};
    AtenTensorHandle handle;  // an offset would be added to the tensor's own
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), 2, turned_sizes, turned_strides, 0, &handle));
    return Tensor(handle);
}

inline int64_t rows_of(const Tensor& matrix, const char* name) {
    STD_TORCH_CHECK(matrix.dim() == 2, name, " must be a matrix, and it has ", matrix.dim(), " dimensions.");
    return matrix.sizes()[0];
}
inline int64_t columns_of(const Tensor& matrix, const char* name) {
    rows_of(matrix, name);
    return matrix.sizes()[1];
}

// In what follows `row` is where x begins in the matrix that dropout's mask is drawn for, and `out` where the result is
// written to: (m, n), contiguous; null: into a fresh tensor.

// h (m, r) = (x * D) Aᵀ
Tensor shrink_by(const Tensor& x, const Tensor& lora_a, double p, const Tensor* state, int64_t row = 0);

// h and y of few tokens, where the kernels make both in one go; else nothing.
std::optional<std::tuple<Tensor, Tensor>> whole_forward(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                                        const Tensor& lora_b, const std::optional<Tensor>& bias,
                                                        double scaling, double p, const Tensor* state);

// y; `linear`, where it is not null, is given what the gain acts on.
Tensor product_with(const Tensor& x, const Tensor& weight, const Tensor& lora_b, const Tensor& h,
                    const std::optional<Tensor>& bias, const std::optional<Tensor>& gain, double scaling,
                    std::optional<Tensor>* linear, const Tensor* out = nullptr);

// dh where it is due, else empty; db where h is there; dbias where bias is.
std::tuple<Tensor, Tensor, Tensor> grads_of_output(const Tensor& dy, const Tensor& lora_b,
                                                   const std::optional<Tensor>& h, const std::optional<Tensor>& bias,
                                                   double scaling, bool need_dh);

// dx of `count` layers, one at least; states is null where nothing is dropped.
Tensor sum_of_input_grads(int64_t count, const Tensor* dys, const Tensor* weights, const Tensor* dhs,
                          const Tensor* lora_as, double p, const Tensor* states, int64_t row = 0,
                          const Tensor* out = nullptr);

// da in the dtype `own`.
Tensor a_grad_in(Dtype own, const Tensor& dh, const Tensor& x, double p, const Tensor* state, int64_t row = 0);

}  // namespace lora_kernels
