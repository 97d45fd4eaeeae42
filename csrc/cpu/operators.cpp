// The three operators for CPU tensors; lora_kernels/ops.py defines their schemas. Torch's part of the work: shapes,
// allocation, adapters of another dtype, and the base product where the library's own is the quicker one.
#include "../common.h"
#include "tensors.h"

namespace lora_kernels {

void parallel(int64_t tasks, void (*body)(void*, int64_t), void* context) {
    if (tasks <= 0) return;
    if (tasks == 1) return body(context, 0);
    struct Call {
        void (*body)(void*, int64_t);
        void* context;
    } call = {body, context};
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(
        0, tasks, 1,
        [](int64_t begin, int64_t end, void* opaque) {
            const Call& to_run = *static_cast<Call*>(opaque);
            for (int64_t task = begin; task < end; ++task) to_run.body(to_run.context, task);
        },
        &call));
}

namespace {

int64_t thread_count() { return torch::stable::get_num_threads(); }

// The library's product, accumulated onto out (m, n): out += left (m, k) right (k, n).
void accumulate_product(const Tensor& out, const Tensor& left, const Tensor& right) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0));
}

// Whether W is multiplied by the kernels. One whose rows do not lie in one piece (Conv1D stores it as (K, N)) they
// would have to copy: that pays where the library's product is slow, in 16 bits, and else the library's takes any
// strides.
bool multiplies(const Tensor& weight, Dtype compute, int64_t m, int64_t n, int64_t k) {
    const bool in_place = k <= 1 || weight.stride(1) == 1;
    return own_product(compute, m, n, k) && (in_place || compute == Dtype::bf16 || compute == Dtype::fp16);
}

Tensor transposed(const Tensor& matrix) {
    const auto sizes = matrix.sizes();
    const auto strides = matrix.strides();
    const int64_t turned_sizes[2] = {sizes[1], sizes[0]}, turned_strides[2] = {strides[1], strides[0]};
    AtenTensorHandle handle;  // an offset would be added to the tensor's own
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), 2, turned_sizes, turned_strides, 0, &handle));
    return Tensor(handle);
}

Dropout dropout_of(const std::optional<Tensor>& state, double p) {
    if (!state.has_value()) return {false, 0, 0, 0, 1.0};
    STD_TORCH_CHECK(state->numel() == 2 && state->scalar_type() == ScalarType::Long,
                    "dropout's state must be the int64 (2,) seed that the native backend draws.");
    const Tensor seed = torch::stable::contiguous(*state);
    const int64_t* words = static_cast<const int64_t*>(seed.const_data_ptr());
    return {true, static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1]), dropout_threshold(p),
            1.0 / (1.0 - p)};
}

// An adapter (or a bias, as one row) as the kernels read it: contiguous, in the accumulation type, rounded to the
// compute dtype. Read in place where it is so already.
struct Adapter {
    std::unique_ptr<Scratch> converted;
    const void* data;

    Adapter(const Tensor& tensor, const char* name, const Kernels& kernels, Dtype compute) {
        const Dtype own = dtype_of(tensor, name);
        const bool vector = tensor.dim() == 1;
        const auto sizes = tensor.sizes();
        const int64_t rows = vector ? 1 : sizes[0], columns = vector ? sizes[0] : sizes[1];
        if (own == compute && own == hidden_of(compute) && tensor.is_contiguous()) {
            data = tensor.const_data_ptr();
            return;
        }
        const size_t size = hidden_of(compute) == Dtype::fp64 ? 8 : 4;
        converted = std::make_unique<Scratch>(static_cast<size_t>(rows * columns) * size);
        data = converted->get();
        kernels.adapter(tensor.const_data_ptr(), own, vector ? 0 : tensor.stride(0), tensor.stride(vector ? 0 : 1),
                        rows, columns, thread_count(), converted->get());
    }
};

// Sizes that the adapters give; every other tensor must fit them. lora_linear has said all this in better words before:
// this is for who calls the operators themselves.
struct Sizes {
    int64_t n, k, r;

    Sizes(const Tensor& lora_a, const Tensor& lora_b) {
        STD_TORCH_CHECK(lora_a.dim() == 2 && lora_b.dim() == 2 && lora_a.sizes()[0] == lora_b.sizes()[1],
                        "lora_a (R, K) and lora_b (N, R) must be matrices of one rank R.");
        n = lora_b.sizes()[0], k = lora_a.sizes()[1], r = lora_a.sizes()[0];
    }
    static void expect(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, Dtype dtype) {
        const auto given = tensor.sizes();
        bool fits = given.size() == sizes.size();
        for (size_t i = 0; fits && i < sizes.size(); ++i) fits = given[i] == sizes.begin()[i];
        STD_TORCH_CHECK(fits, name,
                        " has a shape that does not fit the other tensors: x is (M, K), weight (N, K), bias (N,), "
                        "dy (M, N), h (M, R).");
        STD_TORCH_CHECK(dtype_of(tensor, name) == dtype, name,
                        " must have the dtype of the product that it is in: x, dy and "
                        "weight share the compute dtype, h is fp32 (fp64 for fp64).");
    }
    void expect_bias(const Tensor& bias) const { expect(bias, "bias", {n}, dtype_of(bias, "bias")); }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                                   const std::optional<Tensor>& bias, double scaling, double p,
                                   const std::optional<Tensor>& state) {
    const Dtype compute = dtype_of(x, "x");
    const Sizes sizes(lora_a, lora_b);
    const Matrix tokens(x, "x");
    const int64_t m = tokens.rows, n = sizes.n, k = sizes.k, r = sizes.r;
    Sizes::expect(x, "x", {m, k}, compute);
    Sizes::expect(weight, "weight", {n, k}, compute);
    if (bias.has_value()) sizes.expect_bias(*bias);
    const Kernels& kernels = kernels_for(compute);
    const Adapter a(lora_a, "lora_a", kernels, compute), b(lora_b, "lora_b", kernels, compute);
    std::optional<Adapter> offset;
    if (bias.has_value()) offset.emplace(*bias, "bias", kernels, compute);
    Tensor y = empty({m, n}, x.scalar_type()), h = empty({m, r}, scalar_type_of(hidden_of(compute)));
    const bool own = multiplies(weight, compute, m, n, k);
    std::optional<Matrix> base;
    if (own) base.emplace(weight, "weight");
    Forward call = {m,
                    n,
                    k,
                    r,
                    tokens.data,
                    base ? base->data : nullptr,
                    tokens.stride,
                    base ? base->stride : 0,
                    a.data,
                    b.data,
                    offset ? offset->data : nullptr,
                    scaling,
                    dropout_of(state, p),
                    own,
                    y.mutable_data_ptr(),
                    h.mutable_data_ptr(),
                    thread_count(),
                    nullptr};
    const Scratch scratch(kernels.forward_scratch(call));
    call.scratch = scratch.get();
    kernels.forward(call);
    if (!own && m > 0 && n > 0 && k > 0) accumulate_product(y, tokens.tensor, transposed(weight));
    return {y, h};
}

// A gradient of an adapter: T for the kernels, its own dtype for the caller.
struct AdapterGradient {
    Tensor result;
    std::unique_ptr<Scratch> sums;
    Dtype own, hidden;
    int64_t count;
    void* data;

    AdapterGradient(bool due, const Tensor& like, Dtype compute, const char* name)
        : own(dtype_of(like, name)), hidden(hidden_of(compute)), count(0), data(nullptr) {
        if (!due) {
            result = empty({0}, like.scalar_type());
            return;
        }
        const auto sizes = like.sizes();
        count = like.numel();
        result =
            sizes.size() == 1 ? empty({sizes[0]}, like.scalar_type()) : empty({sizes[0], sizes[1]}, like.scalar_type());
        if (own == hidden) {
            data = result.mutable_data_ptr();
        } else {
            sums = std::make_unique<Scratch>(static_cast<size_t>(count) * (hidden == Dtype::fp64 ? 8 : 4));
            data = sums->get();
        }
    }
    void finish(const Kernels& kernels) const {
        if (sums != nullptr) kernels.gradient(data, count, own, result.mutable_data_ptr());
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const std::optional<Tensor>& x,
                                                    const std::optional<Tensor>& weight, const Tensor& lora_a,
                                                    const Tensor& lora_b, const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& h, double scaling, double p,
                                                    const std::optional<Tensor>& state) {
    const Dtype compute = dtype_of(dy, "dy");
    const Sizes sizes(lora_a, lora_b);
    const Matrix outer(dy, "dy");
    const int64_t m = outer.rows, n = sizes.n, k = sizes.k, r = sizes.r;
    Sizes::expect(dy, "dy", {m, n}, compute);
    if (x.has_value()) Sizes::expect(*x, "x", {m, k}, compute);
    if (weight.has_value()) Sizes::expect(*weight, "weight", {n, k}, compute);
    if (h.has_value()) Sizes::expect(*h, "h", {m, r}, hidden_of(compute));
    if (bias.has_value()) sizes.expect_bias(*bias);
    std::optional<Matrix> tokens, base;
    if (x.has_value()) tokens.emplace(*x, "x");
    const bool own = weight.has_value() ? multiplies(*weight, compute, m, n, k) : own_product(compute, m, n, k);
    if (own && weight.has_value()) base.emplace(*weight, "weight");
    const Kernels& kernels = kernels_for(compute);
    const Adapter a(lora_a, "lora_a", kernels, compute), b(lora_b, "lora_b", kernels, compute);
    Tensor dx = weight.has_value() ? empty({m, k}, dy.scalar_type()) : empty({0}, dy.scalar_type());
    const AdapterGradient da(x.has_value(), lora_a, compute, "lora_a");
    const AdapterGradient db(h.has_value(), lora_b, compute, "lora_b");
    const AdapterGradient dbias(bias.has_value(), bias.has_value() ? *bias : dy, compute, "bias");
    std::optional<Tensor> hidden;
    if (h.has_value()) hidden = torch::stable::contiguous(*h);
    Backward call = {m,
                     n,
                     k,
                     r,
                     outer.data,
                     tokens ? tokens->data : nullptr,
                     base ? base->data : nullptr,
                     outer.stride,
                     tokens ? tokens->stride : 0,
                     base ? base->stride : 0,
                     a.data,
                     b.data,
                     hidden ? hidden->const_data_ptr() : nullptr,
                     scaling,
                     dropout_of(state, p),
                     own,
                     weight.has_value() ? dx.mutable_data_ptr() : nullptr,
                     da.data,
                     db.data,
                     dbias.data,
                     thread_count(),
                     nullptr};
    const Scratch scratch(kernels.backward_scratch(call));
    call.scratch = scratch.get();
    kernels.backward(call);
    da.finish(kernels);
    db.finish(kernels);
    dbias.finish(kernels);
    if (weight.has_value() && !own && m > 0 && n > 0 && k > 0) accumulate_product(dx, outer.tensor, *weight);
    return {dx, da.result, db.result, dbias.result};
}

Tensor mask(const Tensor& state, int64_t rows, int64_t columns, double p) {
    Tensor keep = empty({rows, columns}, ScalarType::Bool);
    kernels_for(Dtype::fp32)
        .mask(dropout_of(state, p), rows, columns, thread_count(), static_cast<bool*>(keep.mutable_data_ptr()));
    return keep;
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
    m.impl("native_forward", TORCH_BOX(&lora_kernels::forward));
    m.impl("native_backward", TORCH_BOX(&lora_kernels::backward));
    m.impl("native_mask", TORCH_BOX(&lora_kernels::mask));
}
