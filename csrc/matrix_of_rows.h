// x and dy of any number of dimensions as the matrix of their rows, and what has their rows in their shape again.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace lora_kernels {

class MatrixOfRows {
  public:
    // (..., F); what is no tensor with rows stays as it is, for whoever reads the matrix refuses it.
    explicit MatrixOfRows(const torch::stable::Tensor& given) : matrix(given), dims_(given.dim()) {
        if (dims_ == 2 || dims_ == 0) return;
        const auto sizes = given.sizes();
        leading_.assign(sizes.begin(), sizes.end() - 1);
        int64_t rows = 1;
        for (const int64_t size : leading_) rows *= size;
        torch::stable::Tensor whole = given;
        int64_t step = dims_ == 1 ? 1 : row_step(dims_, sizes.data(), given.strides().data());
        if (step < 0) whole = torch::stable::contiguous(given), step = sizes[dims_ - 1];
        matrix = view(whole, {rows, sizes[dims_ - 1]}, {step, whole.stride(dims_ - 1)});
    }
    // The contiguous (M, F) in the leading dimensions of what was given.
    torch::stable::Tensor restored(const torch::stable::Tensor& result) const {
        if (dims_ == 2) return result;
        std::vector<int64_t> sizes = leading_, strides(sizes.size() + 1, 1);
        sizes.push_back(result.sizes()[1]);
        for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
        return view(result, sizes, strides);
    }

    // From each row of (..., F) to the next; below 0 where rows are not at one distance.
    static int64_t row_step(int64_t dims, const int64_t* sizes, const int64_t* strides) {
        int64_t step = -1, next = 0;
        for (int64_t i = dims - 2; i >= 0; --i) {
            if (sizes[i] == 1) continue;
            if (step >= 0 && strides[i] != next) return -1;
            if (step < 0) step = strides[i];
            next = strides[i] * sizes[i];
        }
        return step < 0 ? strides[dims - 2] : step;  // one row
    }

    torch::stable::Tensor matrix;

  private:
    // An offset would be added to the tensor's own.
    static torch::stable::Tensor view(const torch::stable::Tensor& of, const std::vector<int64_t>& sizes,
                                      const std::vector<int64_t>& strides) {
        AtenTensorHandle made;
        TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(of.get(), static_cast<int64_t>(sizes.size()),
                                                              sizes.data(), strides.data(), 0, &made));
        return torch::stable::Tensor(made);
    }

    int64_t dims_;
    std::vector<int64_t> leading_;
};

}  // namespace lora_kernels
