// The operators of a mixture's stacked experts for CPU tensors: sorted rows, a layer's forward or backward for the rows
// of each expert, written where they belong in one result.
#include <algorithm>
#include <cstring>
#include <vector>

#include "layer.h"

namespace lora_kernels {
namespace {

// A view of some rows of a matrix, or of one matrix of a stack.
Tensor rows_from(const Tensor& matrix, int64_t begin, int64_t count) {
    const int64_t sizes[2] = {count, matrix.sizes()[1]}, strides[2] = {matrix.stride(0), matrix.stride(1)};
    AtenTensorHandle handle;  // the offset is added to the tensor's own
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes, strides, begin * strides[0], &handle));
    return Tensor(handle);
}
Tensor of_expert(const Tensor& stack, int64_t expert) {
    const int64_t sizes[2] = {stack.sizes()[1], stack.sizes()[2]}, strides[2] = {stack.stride(1), stack.stride(2)};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(stack.get(), 2, sizes, strides, expert * stack.stride(0), &handle));
    return Tensor(handle);
}

// An expert's weight in the compute dtype: under autocast it is stored in a wider one.
Tensor weight_of(const Tensor& stack, int64_t expert, ScalarType dtype) {
    Tensor weight = of_expert(stack, expert);
    return weight.scalar_type() == dtype ? weight : torch::stable::to(weight, dtype);
}

// What is asked for: rows (m, k), in sorted order, of one expert after the other.
struct Experts {
    struct Part {
        int64_t expert, begin, count;
    };
    int64_t count, r, k, n, m, end;
    std::vector<Part> parts;  // of the experts that have rows

    Experts(const Tensor& lora_a, const Tensor& lora_b, const Tensor& offsets, int64_t m) : m(m), end(0) {
        STD_TORCH_CHECK(lora_a.dim() == 3 && lora_b.dim() == 3, "lora_a (E, R, K) and lora_b (E, N, R) are stacks.");
        count = lora_a.sizes()[0], r = lora_a.sizes()[1], k = lora_a.sizes()[2], n = lora_b.sizes()[1];
        STD_TORCH_CHECK(lora_b.sizes()[0] == count && lora_b.sizes()[2] == r,
                        "lora_a (E, R, K) and lora_b (E, N, R) must have one number of experts and one rank.");
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

    void expect_weight(const Tensor& weight) const {
        const auto sizes = weight.sizes();
        STD_TORCH_CHECK(sizes.size() == 3 && sizes[0] == count && sizes[1] == n && sizes[2] == k,
                        "weight must be (E, N, K) of lora_a's E and K, and lora_b's N.");
    }
    int64_t longest() const {
        int64_t most = 0;
        for (const Part& part : parts) most = std::max(most, part.count);
        return most;
    }
};

// The rows of x that belong to an expert: a view, or where x has the tokens themselves a copy of those, in memory that
// all experts share.
class Rows {
  public:
    Rows(const Tensor& x, const std::optional<Tensor>& tokens, const Experts& experts) : x_(x) {
        STD_TORCH_CHECK(x.dim() == 2 && x.sizes()[1] == experts.k, "x must be (M, K) of lora_a's K.");
        if (!tokens.has_value()) {
            STD_TORCH_CHECK(x.sizes()[0] == experts.m, "x must have a row for each of dy's, or tokens be given.");
            return;
        }
        STD_TORCH_CHECK(
            tokens->scalar_type() == ScalarType::Long && tokens->is_contiguous() && tokens->numel() == experts.m,
            "tokens must be int64 (M,) and contiguous.");
        source_.emplace(x, "x");
        size_ = static_cast<int64_t>(size_of(dtype_of(x, "x")));
        tokens_ = static_cast<const int64_t*>(tokens->const_data_ptr());
        for (int64_t i = 0; i < experts.end; ++i)
            STD_TORCH_CHECK(tokens_[i] >= 0 && tokens_[i] < source_->rows, "tokens must be rows of x.");
        copied_.emplace(empty({experts.longest(), experts.k}, x.scalar_type()));
    }

    Tensor of(const Experts::Part& part) {
        if (!copied_.has_value()) return rows_from(x_, part.begin, part.count);
        struct Copy {
            const Rows& rows;
            const Experts::Part& part;
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
    const int64_t* tokens_ = nullptr;
    int64_t size_ = 0;
};

// The schema lets an adapter be absent, for eager's sake.
const Tensor& given(const std::optional<Tensor>& adapter) {
    STD_TORCH_CHECK(adapter.has_value(), "native computes experts with an adapter: lora_a and lora_b must be given.");
    return *adapter;
}

// Writes `source`, contiguous, into `target` from its element `at` on.
void put(const Tensor& source, const Tensor& target, int64_t at) {
    const size_t size = size_of(dtype_of(source, "a result"));
    char* to = static_cast<char*>(target.mutable_data_ptr()) + static_cast<size_t>(at) * size;
    std::memcpy(to, source.const_data_ptr(), static_cast<size_t>(source.numel()) * size);
}
void clear(const Tensor& target, int64_t from, int64_t count) {
    const size_t size = size_of(dtype_of(target, "a result"));
    char* to = static_cast<char*>(target.mutable_data_ptr()) + static_cast<size_t>(from) * size;
    std::memset(to, 0, static_cast<size_t>(count) * size);
}

std::tuple<Tensor, Tensor> experts_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& given_a,
                                           const std::optional<Tensor>& given_b, const Tensor& offsets,
                                           const std::optional<Tensor>& tokens, double scaling, double p,
                                           const std::optional<Tensor>& state) {
    const Tensor &lora_a = given(given_a), &lora_b = given(given_b);
    const Experts experts(lora_a, lora_b, offsets, tokens.has_value() ? tokens->numel() : rows_of(x, "x"));
    experts.expect_weight(weight);
    Rows rows(x, tokens, experts);
    const int64_t r = experts.r, n = experts.n;
    Tensor y = empty({experts.m, n}, x.scalar_type()),
           h = empty({experts.m, r}, scalar_type_of(hidden_of(dtype_of(x, "x"))));
    for (const auto& part : experts.parts) {
        const Tensor own = rows.of(part), out = rows_from(y, part.begin, part.count);
        const Tensor low = shrink_by(own, of_expert(lora_a, part.expert), p, pointer(state), part.begin);
        product_with(own, weight_of(weight, part.expert, x.scalar_type()), of_expert(lora_b, part.expert), low,
                     std::nullopt, std::nullopt, scaling, nullptr, &out);
        put(low, h, part.begin * r);
    }
    clear(y, experts.end * n, (experts.m - experts.end) * n);
    clear(h, experts.end * r, (experts.m - experts.end) * r);
    return {y, h};
}

std::tuple<Tensor, Tensor, Tensor> experts_backward(const Tensor& dy, const std::optional<Tensor>& x,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& given_a,
                                                    const std::optional<Tensor>& given_b, const Tensor& offsets,
                                                    const std::optional<Tensor>& tokens, const std::optional<Tensor>& h,
                                                    double scaling, double p, const std::optional<Tensor>& state) {
    const Tensor &lora_a = given(given_a), &lora_b = given(given_b);
    const Experts experts(lora_a, lora_b, offsets, rows_of(dy, "dy"));
    const int64_t r = experts.r, k = experts.k, n = experts.n;
    const Dtype own_a = dtype_of(lora_a, "lora_a");
    std::optional<Rows> rows;
    if (x.has_value()) rows.emplace(*x, tokens, experts);
    if (weight.has_value()) experts.expect_weight(*weight);
    if (h.has_value()) expect(*h, "h", {experts.m, r});
    Tensor dx = weight.has_value() ? empty({experts.m, k}, dy.scalar_type()) : empty({0}, dy.scalar_type()),
           da = x.has_value() ? empty({experts.count, r, k}, lora_a.scalar_type()) : empty({0}, lora_a.scalar_type()),
           db = h.has_value() ? empty({experts.count, n, r}, lora_b.scalar_type()) : empty({0}, lora_b.scalar_type());
    clear(da, 0, da.numel());  // experts without rows
    clear(db, 0, db.numel());
    const Tensor* seed = pointer(state);
    for (const auto& part : experts.parts) {
        const Tensor outer = rows_from(dy, part.begin, part.count), a = of_expert(lora_a, part.expert);
        const std::optional<Tensor> low =
            h.has_value() ? std::optional(rows_from(*h, part.begin, part.count)) : std::nullopt;
        const auto [dh, own_db, unused] = grads_of_output(outer, of_expert(lora_b, part.expert), low, std::nullopt,
                                                          scaling, x.has_value() || weight.has_value());
        if (h.has_value()) put(own_db, db, part.expert * n * r);
        if (x.has_value()) put(a_grad_in(own_a, dh, rows->of(part), p, seed, part.begin), da, part.expert * r * k);
        if (weight.has_value()) {
            const Tensor base = weight_of(*weight, part.expert, dy.scalar_type()),
                         out = rows_from(dx, part.begin, part.count);
            sum_of_input_grads(1, &outer, &base, &dh, &a, p, seed, part.begin, &out);
        }
    }
    if (weight.has_value()) clear(dx, experts.end * k, (experts.m - experts.end) * k);
    return {dx, da, db};
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
    m.impl("native_experts_forward", TORCH_BOX(&lora_kernels::experts_forward));
    m.impl("native_experts_backward", TORCH_BOX(&lora_kernels::experts_backward));
}
