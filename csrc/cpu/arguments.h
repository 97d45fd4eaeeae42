// What the operators make of their arguments before the kernels see them: checks, adapters of another dtype, results.
#pragma once

#include <vector>

#include "../common.h"
#include "tensors.h"

namespace lora_kernels {

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

inline void expect(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, Dtype dtype) {
    const auto given = tensor.sizes();
    bool fits = given.size() == sizes.size();
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = given[i] == sizes.begin()[i];
    STD_TORCH_CHECK(fits, name,
                    " has a shape that does not fit the other tensors: x is (M, K), weight (N, K), lora_a (R, K), "
                    "lora_b (N, R), bias and gain (N,), dy and linear (M, N), h and dh (M, R).");
    STD_TORCH_CHECK(dtype_of(tensor, name) == dtype, name,
                    " must have the dtype of the product that it is in: x, dy, weight and linear share the compute "
                    "dtype, h and dh are fp32 (fp64 for fp64).");
}

// An adapter, bias or gain, which may have any dtype.
inline void expect(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    expect(tensor, name, sizes, dtype_of(tensor, name));
}

inline void expect(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    if (tensor.has_value()) expect(*tensor, name, sizes);
}

// `row`: where the call's rows begin in the matrix that the mask is drawn for.
inline Dropout dropout_of(const Tensor* state, double p, int64_t row = 0) {
    if (state == nullptr) return {false, 0, 0, 0, 1.0};
    STD_TORCH_CHECK(state->numel() == 2 && state->scalar_type() == ScalarType::Long,
                    "dropout's state must be the int64 (2,) seed that the native backend draws.");
    const Tensor seed = torch::stable::contiguous(*state);
    const int64_t* words = static_cast<const int64_t*>(seed.const_data_ptr());
    return {true, static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1]), dropout_keep(p), 1.0 / (1.0 - p),
            row};
}

inline const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor.has_value() ? &*tensor : nullptr; }

// An adapter (or a vector, as one row) as the kernels read it: contiguous, in the accumulation type, rounded to the
// dtype `compute`. Read in place where it is so already.
struct Adapter {
    std::unique_ptr<Scratch> converted;
    const void* data;

    Adapter(const Tensor& tensor, const char* name, Dtype compute) {
        const Dtype own = dtype_of(tensor, name);
        if (own == compute && own == hidden_of(compute) && tensor.is_contiguous()) {
            data = tensor.const_data_ptr();
            return;
        }
        const bool vector = tensor.dim() == 1;
        const auto sizes = tensor.sizes();
        const int64_t rows = vector ? 1 : sizes[0], columns = vector ? sizes[0] : sizes[1];
        converted = std::make_unique<Scratch>(static_cast<size_t>(rows * columns) * size_of(hidden_of(compute)));
        data = converted->get();
        const Stored stored = {tensor.const_data_ptr(), own, vector ? 0 : tensor.stride(0),
                               tensor.stride(vector ? 0 : 1)};
        kernels_for(compute).adapter(stored, rows, columns, thread_count(), converted->get());
    }
};

// As an Adapter, of a tensor that may be absent.
struct OptionalAdapter {
    std::optional<Adapter> adapter;
    const void* data = nullptr;

    OptionalAdapter(const std::optional<Tensor>& tensor, const char* name, Dtype compute) {
        if (tensor.has_value()) data = adapter.emplace(*tensor, name, compute).data;
    }
};

// The results that are often not due.
enum class Result { da, db, dbias, dgain };

// What stands for one that is not: made once for each place and dtype, for making it takes a good part of a call's
// time.
inline const Tensor& not_due(Result result, Dtype dtype) {
    static const std::vector<Tensor>& all = *[] {
        auto* const made = new std::vector<Tensor>;
        for (int place = 0; place < 4; ++place) {
            for (const Dtype of : {Dtype::fp32, Dtype::bf16, Dtype::fp16, Dtype::fp64}) {
                made->push_back(empty({0}, scalar_type_of(of)));
            }
        }
        return made;
    }();
    const size_t of = dtype == Dtype::fp32 ? 0 : dtype == Dtype::bf16 ? 1 : dtype == Dtype::fp16 ? 2 : 3;
    return all[4 * static_cast<size_t>(result) + of];
}

// The gradient of an adapter, bias or gain: T for the kernels, `own` dtype for the caller; one that is not due is
// empty, and its data null.
struct AdapterGradient {
    Tensor result;
    std::unique_ptr<Scratch> sums;
    Dtype own, hidden;
    int64_t count = 1;
    void* data = nullptr;

    AdapterGradient(Result which, bool due, std::initializer_list<int64_t> sizes, Dtype own, Dtype compute)
        : result(due ? empty(sizes, scalar_type_of(own)) : not_due(which, own)), own(own), hidden(hidden_of(compute)) {
        if (!due) return;
        for (const int64_t size : sizes) count *= size;
        if (own == hidden) {
            data = result.mutable_data_ptr();
        } else {
            sums = std::make_unique<Scratch>(static_cast<size_t>(count) * size_of(hidden));
            data = sums->get();
        }
    }
    void finish(const Kernels& kernels) const {
        if (sums != nullptr) kernels.gradient(data, count, own, result.mutable_data_ptr());
    }
};

}  // namespace lora_kernels
