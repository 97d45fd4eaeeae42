// What the operators of stacked experts share: the rows and the matrices of each expert.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "layer.h"

namespace lora_kernels {

// A view of some rows of a matrix, or of one matrix of a stack.
inline Tensor rows_from(const Tensor& matrix, int64_t begin, int64_t count) {
    const int64_t sizes[2] = {count, matrix.sizes()[1]}, strides[2] = {matrix.stride(0), matrix.stride(1)};
    AtenTensorHandle handle;  // the offset is added to the tensor's own
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes, strides, begin * strides[0], &handle));
    return Tensor(handle);
}
inline Tensor of_expert(const Tensor& stack, int64_t expert) {
    const int64_t sizes[2] = {stack.sizes()[1], stack.sizes()[2]}, strides[2] = {stack.stride(1), stack.stride(2)};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(stack.get(), 2, sizes, strides, expert * stack.stride(0), &handle));
    return Tensor(handle);
}

// An expert's weight in the compute dtype: under autocast it is stored in a wider one.
inline Tensor weight_of(const Tensor& stack, int64_t expert, ScalarType dtype) {
    Tensor weight = of_expert(stack, expert);
    return weight.scalar_type() == dtype ? weight : torch::stable::to(weight, dtype);
}

// The rows that each expert has of m, in sorted order.
struct Routed {
    struct Part {
        int64_t expert, begin, count;
    };
    int64_t m, end = 0;
    std::vector<Part> parts;  // of the experts that have rows

    Routed(const Tensor& offsets, int64_t count, int64_t m) : m(m) {
        STD_TORCH_CHECK(offsets.dim() == 1 && offsets.numel() == count && offsets.scalar_type() == ScalarType::Int &&
                            offsets.is_contiguous(),
                        "offsets must be int32 (E,) and contiguous.");
        const int32_t* ends = static_cast<const int32_t*>(offsets.const_data_ptr());
        for (int64_t e = 0; e < count; ++e) {
            STD_TORCH_CHECK(ends[e] >= end && ends[e] <= m, "offsets must ascend to at most the number of rows.");
            if (ends[e] > end) parts.push_back({e, end, ends[e] - end});
            end = ends[e];
        }
    }

    int64_t longest() const {
        int64_t most = 0;
        for (const Part& part : parts) most = std::max(most, part.count);
        return most;
    }
};

// The adapters of a stacked projection.
struct Stacked {
    int64_t count, r, k, n;

    Stacked(const Tensor& lora_a, const Tensor& lora_b) {
        STD_TORCH_CHECK(lora_a.dim() == 3 && lora_b.dim() == 3, "lora_a (E, R, K) and lora_b (E, N, R) are stacks.");
        count = lora_a.sizes()[0], r = lora_a.sizes()[1], k = lora_a.sizes()[2], n = lora_b.sizes()[1];
        STD_TORCH_CHECK(lora_b.sizes()[0] == count && lora_b.sizes()[2] == r,
                        "lora_a (E, R, K) and lora_b (E, N, R) must have one number of experts and one rank.");
    }

    void expect_weight(const Tensor& weight) const {
        const auto sizes = weight.sizes();
        STD_TORCH_CHECK(sizes.size() == 3 && sizes[0] == count && sizes[1] == n && sizes[2] == k,
                        "weight must be (E, N, K) of lora_a's E and K, and lora_b's N.");
    }
};

// The rows of x that belong to an expert: a view, or where x has the tokens themselves a copy of those, in memory that
// all experts share.
class Rows {
  public:
    // `tokens`: of each sorted row its row of x; null: x has the sorted rows.
    Rows(const Tensor& x, const int64_t* tokens, const Routed& routed, int64_t k) : x_(x), tokens_(tokens) {
        STD_TORCH_CHECK(x.dim() == 2 && x.sizes()[1] == k, "x must be (M, K) of lora_a's K.");
        if (tokens == nullptr) {
            STD_TORCH_CHECK(x.sizes()[0] == routed.m, "x must have a row for each of dy's, or tokens be given.");
            return;
        }
        source_.emplace(x, "x");
        size_ = static_cast<int64_t>(size_of(dtype_of(x, "x")));
        for (int64_t i = 0; i < routed.end; ++i)
            STD_TORCH_CHECK(tokens[i] >= 0 && tokens[i] < source_->rows, "tokens must be rows of x.");
        copied_.emplace(empty({routed.longest(), k}, x.scalar_type()));
    }

    Tensor of(const Routed::Part& part) const {
        if (!copied_.has_value()) return rows_from(x_, part.begin, part.count);
        struct Copy {
            const Rows& rows;
            const Routed::Part& part;
            int64_t tasks;
        } copy = {*this, part, std::min(thread_count(), part.count)};
        parallel(
            copy.tasks,
            [](void* opaque, int64_t task) {
                const Copy& to_do = *static_cast<const Copy*>(opaque);
                const int64_t first = to_do.part.count * task / to_do.tasks,
                              last = to_do.part.count * (task + 1) / to_do.tasks;
                to_do.rows.copy(to_do.part.begin, first, last);
            },
            &copy);
        return rows_from(*copied_, 0, part.count);
    }

  private:
    void copy(int64_t begin, int64_t first, int64_t last) const {
        const int64_t width = source_->columns * size_;
        const char* from = static_cast<const char*>(source_->data);
        char* to = static_cast<char*>(copied_->mutable_data_ptr());
        for (int64_t i = first; i < last; ++i) {
            std::memcpy(to + i * width, from + tokens_[begin + i] * source_->stride * size_,
                        static_cast<size_t>(width));
        }
    }

    Tensor x_;
    std::optional<Matrix> source_;
    std::optional<Tensor> copied_;
    const int64_t* tokens_;
    int64_t size_ = 0;
};

// Writes `source`, contiguous, into `target` from its element `at` on.
inline void put(const Tensor& source, const Tensor& target, int64_t at) {
    if (source.numel() == 0) return;  // there may be no memory to name
    const size_t size = size_of(dtype_of(source, "a result"));
    char* to = static_cast<char*>(target.mutable_data_ptr()) + static_cast<size_t>(at) * size;
    std::memcpy(to, source.const_data_ptr(), static_cast<size_t>(source.numel()) * size);
}
inline void clear(const Tensor& target, int64_t from, int64_t count) {
    if (count == 0) return;
    const size_t size = size_of(dtype_of(target, "a result"));
    char* to = static_cast<char*>(target.mutable_data_ptr()) + static_cast<size_t>(from) * size;
    std::memset(to, 0, static_cast<size_t>(count) * size);
}

}  // namespace lora_kernels
