// The operators of a layer for CPU tensors; lora_kernels/ops.py defines their schemas, layer.h has the parts.
#include <algorithm>
#include <vector>

#include "../matrix_of_rows.h"
#include "layer.h"

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

Tensor shrink(const Tensor& x, const Tensor& lora_a, double p, const std::optional<Tensor>& state) {
    return shrink_by(x, lora_a, p, pointer(state));
}

std::tuple<Tensor, Tensor> product(const Tensor& x, const Tensor& weight, const Tensor& lora_b, const Tensor& h,
                                   const std::optional<Tensor>& bias, const std::optional<Tensor>& gain, double scaling,
                                   bool with_linear) {
    std::optional<Tensor> linear;
    Tensor y = product_with(x, weight, lora_b, h, bias, gain, scaling, with_linear ? &linear : nullptr);
    return {y, linear.has_value() ? *linear : empty({0}, x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> output_grads(const Tensor& dy, const Tensor& lora_b, const std::optional<Tensor>& h,
                                                const std::optional<Tensor>& bias, double scaling) {
    return grads_of_output(dy, lora_b, h, bias, scaling, true);
}

Tensor input_grad(const std::vector<Tensor>& dys, const std::vector<Tensor>& weights, const std::vector<Tensor>& dhs,
                  const std::vector<Tensor>& lora_as, double p, const std::vector<Tensor>& states) {
    const size_t count = dys.size();
    STD_TORCH_CHECK(weights.size() == count && dhs.size() == count && lora_as.size() == count &&
                        (states.empty() || states.size() == count),
                    "dys, weights, dhs and lora_as must be as long as each other, and so must states be, or empty.");
    return sum_of_input_grads(static_cast<int64_t>(count), dys.data(), weights.data(), dhs.data(), lora_as.data(), p,
                              states.empty() ? nullptr : states.data());
}

Tensor a_grad(const Tensor& dh, const Tensor& x, double p, const std::optional<Tensor>& state) {
    return a_grad_in(hidden_of(dtype_of(x, "x")), dh, x, p, pointer(state));
}

std::tuple<Tensor, Tensor, Tensor> gain_grad(const Tensor& dy, const std::optional<Tensor>& linear, const Tensor& gain,
                                             const std::optional<Tensor>& bias) {
    const Dtype compute = dtype_of(dy, "dy");
    const Matrix outer(dy, "dy");
    const int64_t m = outer.rows, n = outer.columns;
    std::optional<Matrix> beside;
    if (linear.has_value()) {
        expect(*linear, "linear", {m, n}, compute);
        beside.emplace(*linear, "linear");
    }
    expect(gain, "gain", {n});
    expect(bias, "bias", {n});
    const Kernels& kernels = kernels_for(compute);
    const Adapter factor(gain, "gain", hidden_of(compute));
    Tensor dlinear = empty({m, n}, dy.scalar_type());
    const AdapterGradient dgain(Result::dgain, linear.has_value(), {n}, dtype_of(gain, "gain"), compute);
    const AdapterGradient dbias(Result::dbias, bias.has_value(), {n},
                                bias.has_value() ? dtype_of(*bias, "bias") : compute, compute);
    kernels.gain_grad({m, n, outer.data, outer.stride, beside ? beside->data : nullptr, beside ? beside->stride : 0,
                       factor.data, dlinear.mutable_data_ptr(), dgain.data, dbias.data, thread_count()});
    dgain.finish(kernels);
    dbias.finish(kernels);
    return {dlinear, dgain.result, dbias.result};
}

Tensor row_norms(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling) {
    const Dtype compute = dtype_of(weight, "weight"), wide = hidden_of(compute);
    const int64_t r = rows_of(lora_a, "lora_a"), k = lora_a.sizes()[1], n = rows_of(lora_b, "lora_b");
    expect(weight, "weight", {n, k}, compute);
    expect(lora_b, "lora_b", {n, r});
    const bool across = n > 1 && k > 1 && weight.stride(0) == 1 && weight.stride(1) != 1;  // as Conv1D stores it
    const Matrix base(across ? transposed(weight) : weight, "weight");
    const Kernels& kernels = kernels_for(compute);
    const Adapter a(lora_a, "lora_a", adapter_of(compute)), b(lora_b, "lora_b", adapter_of(compute));
    Tensor norms = empty({n}, scalar_type_of(wide));
    RowNormsCall call = {
        n,      k, r, base.data, base.stride, across, a.data, b.data, scaling, norms.mutable_data_ptr(), thread_count(),
        nullptr};
    Scratch scratch(kernels.row_norms_scratch(call));
    call.scratch = scratch.get();
    kernels.row_norms(call);
    return norms;
}

void expect_gate(const Tensor& gate, const Tensor& up, int64_t number) {
    STD_TORCH_CHECK(gate.dim() == 2 && up.dim() == 2 && gate.sizes()[0] == up.sizes()[0] &&
                        gate.sizes()[1] == up.sizes()[1] && dtype_of(gate, "gate") == dtype_of(up, "up"),
                    "gate and up must be matrices (M, F) of one shape and dtype.");
    STD_TORCH_CHECK(number >= 0 && number <= 2, "the gate's number must be 0, 1 or 2, and ", number, " was given.");
}

Tensor gated(const Tensor& gate, const Tensor& up, int64_t number) {
    expect_gate(gate, up, number);
    const Matrix left(gate, "gate"), right(up, "up");
    Tensor a = empty({left.rows, left.columns}, gate.scalar_type());
    kernels_for(dtype_of(gate, "gate"))
        .gated({left.rows, left.columns, number, left.data, left.stride, right.data, right.stride, nullptr, 0,
                a.mutable_data_ptr(), nullptr, nullptr, left.columns, thread_count()});
    return a;
}

std::tuple<Tensor, Tensor> gated_grad(const Tensor& da, const Tensor& gate, const Tensor& up, int64_t number,
                                      bool joined) {
    expect_gate(gate, up, number);
    expect_gate(da, gate, number);
    const Matrix outer(da, "da"), left(gate, "gate"), right(up, "up");
    const int64_t m = left.rows, n = left.columns;
    const Dtype compute = dtype_of(gate, "gate");
    Tensor dgate = empty({m, joined ? 2 * n : n}, gate.scalar_type()),
           dup = joined ? empty({0}, gate.scalar_type()) : empty({m, n}, gate.scalar_type());
    char* first = static_cast<char*>(dgate.mutable_data_ptr());
    void* second = joined ? first + n * static_cast<int64_t>(size_of(compute)) : dup.mutable_data_ptr();
    kernels_for(compute).gated({m, n, number, left.data, left.stride, right.data, right.stride, outer.data,
                                outer.stride, nullptr, first, second, joined ? 2 * n : n, thread_count()});
    return {dgate, dup};
}

void expect_one_rank(const Tensor& lora_a, const Tensor& lora_b) {
    const int64_t r = rows_of(lora_a, "lora_a");
    STD_TORCH_CHECK(r >= 1 && r == columns_of(lora_b, "lora_b"),
                    "lora_a (R, K) and lora_b (N, R) must be matrices of one rank R >= 1.");
}

// What stands for the packed mask, which is drawn again instead; one for all, for making it takes a call's time.
const Tensor& no_words() {
    static const Tensor& words = *new Tensor(empty({0}, ScalarType::Int));
    return words;
}

// x is (..., K), and y then (..., N).
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                           const Tensor& lora_b, const std::optional<Tensor>& bias, double scaling,
                                           double p, const std::optional<Tensor>& state) {
    expect_one_rank(lora_a, lora_b);
    const MatrixOfRows rows(x);
    const Tensor& tokens = rows.matrix;
    if (auto whole = whole_forward(tokens, weight, lora_a, lora_b, bias, scaling, p, pointer(state)))
        return {rows.restored(std::get<1>(*whole)), std::get<0>(*whole), no_words()};
    Tensor h = shrink(tokens, lora_a, p, state);
    return {rows.restored(product_with(tokens, weight, lora_b, h, bias, std::nullopt, scaling, nullptr)), h,
            no_words()};
}

// dy is (..., N), x (..., K), and dx then too.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const std::optional<Tensor>& x,
                                                    const std::optional<Tensor>& weight, const Tensor& lora_a,
                                                    const Tensor& lora_b, const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& h, double scaling, double p,
                                                    const std::optional<Tensor>& state) {
    expect_one_rank(lora_a, lora_b);
    const MatrixOfRows rows(dy);
    const Tensor& outer = rows.matrix;
    std::optional<MatrixOfRows> tokens;
    if (x.has_value()) {
        tokens.emplace(*x);
        expect(tokens->matrix, "x", {rows_of(outer, "dy"), lora_a.sizes()[1]}, dtype_of(dy, "dy"));
    }
    const Tensor* seed = pointer(state);
    auto [dh, db, dbias] = grads_of_output(outer, lora_b, h, bias, scaling, x.has_value() || weight.has_value());
    const Dtype own = dtype_of(lora_a, "lora_a");
    Tensor da = tokens ? a_grad_in(own, dh, tokens->matrix, p, seed) : empty({0}, scalar_type_of(own));
    Tensor dx = weight.has_value() ? rows.restored(sum_of_input_grads(1, &outer, &*weight, &dh, &lora_a, p, seed))
                                   : empty({0}, dy.scalar_type());
    return {dx, da, db, dbias};
}

Tensor mask(const Tensor& state, int64_t rows, int64_t columns, double p) {
    Tensor keep = empty({rows, columns}, ScalarType::Bool);
    kernels_for(Dtype::fp32)
        .mask(dropout_of(&state, p), rows, columns, thread_count(), static_cast<bool*>(keep.mutable_data_ptr()));
    return keep;
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
    m.impl("native_forward", TORCH_BOX(&lora_kernels::forward));
    m.impl("native_backward", TORCH_BOX(&lora_kernels::backward));
    m.impl("native_mask", TORCH_BOX(&lora_kernels::mask));
    m.impl("native_shrink", TORCH_BOX(&lora_kernels::shrink));
    m.impl("native_product", TORCH_BOX(&lora_kernels::product));
    m.impl("native_output_grads", TORCH_BOX(&lora_kernels::output_grads));
    m.impl("native_input_grad", TORCH_BOX(&lora_kernels::input_grad));
    m.impl("native_a_grad", TORCH_BOX(&lora_kernels::a_grad));
    m.impl("native_gain_grad", TORCH_BOX(&lora_kernels::gain_grad));
    m.impl("native_row_norms", TORCH_BOX(&lora_kernels::row_norms));
    m.impl("native_gated", TORCH_BOX(&lora_kernels::gated));
    m.impl("native_gated_grad", TORCH_BOX(&lora_kernels::gated_grad));
}
