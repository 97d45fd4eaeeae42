// The operators of one projection of a mixture's stacked experts for CPU tensors: sorted rows, a layer's forward or
// backward for the rows of each expert, written where they belong in one result.
#include "experts.h"

namespace lora_kernels {
namespace {

// The schema lets an adapter be absent, for eager's sake.
const Tensor& given(const std::optional<Tensor>& adapter) {
    STD_TORCH_CHECK(adapter.has_value(), "native computes experts with an adapter: lora_a and lora_b must be given.");
    return *adapter;
}

// `tokens`, or null.
const int64_t* values_of(const std::optional<Tensor>& tokens, int64_t m) {
    if (!tokens.has_value()) return nullptr;
    STD_TORCH_CHECK(tokens->scalar_type() == ScalarType::Long && tokens->is_contiguous() && tokens->numel() == m,
                    "tokens must be int64 (M,) and contiguous.");
    return static_cast<const int64_t*>(tokens->const_data_ptr());
}

std::tuple<Tensor, Tensor> experts_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& given_a,
                                           const std::optional<Tensor>& given_b, const Tensor& offsets,
                                           const std::optional<Tensor>& tokens, double scaling, double p,
                                           const std::optional<Tensor>& state) {
    const Tensor &lora_a = given(given_a), &lora_b = given(given_b);
    const Stacked stacked(lora_a, lora_b);
    stacked.expect_weight(weight);
    const Routed routed(offsets, stacked.count, tokens.has_value() ? tokens->numel() : rows_of(x, "x"));
    const Rows rows(x, values_of(tokens, routed.m), routed, stacked.k);
    const int64_t r = stacked.r, n = stacked.n;
    Tensor y = empty({routed.m, n}, x.scalar_type()),
           h = empty({routed.m, r}, scalar_type_of(hidden_of(dtype_of(x, "x"))));
    for (const auto& part : routed.parts) {
        const Tensor own = rows.of(part), out = rows_from(y, part.begin, part.count);
        const Tensor low = shrink_by(own, of_expert(lora_a, part.expert), p, pointer(state), part.begin);
        product_with(own, weight_of(weight, part.expert, x.scalar_type()), of_expert(lora_b, part.expert), low,
                     std::nullopt, std::nullopt, scaling, nullptr, &out);
        put(low, h, part.begin * r);
    }
    clear(y, routed.end * n, (routed.m - routed.end) * n);
    clear(h, routed.end * r, (routed.m - routed.end) * r);
    return {y, h};
}

std::tuple<Tensor, Tensor, Tensor> experts_backward(const Tensor& dy, const std::optional<Tensor>& x,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& given_a,
                                                    const std::optional<Tensor>& given_b, const Tensor& offsets,
                                                    const std::optional<Tensor>& tokens, const std::optional<Tensor>& h,
                                                    double scaling, double p, const std::optional<Tensor>& state) {
    const Tensor &lora_a = given(given_a), &lora_b = given(given_b);
    const Stacked stacked(lora_a, lora_b);
    const Routed routed(offsets, stacked.count, rows_of(dy, "dy"));
    const int64_t r = stacked.r, k = stacked.k, n = stacked.n;
    const Dtype own_a = dtype_of(lora_a, "lora_a");
    std::optional<Rows> rows;
    if (x.has_value()) rows.emplace(*x, values_of(tokens, routed.m), routed, k);
    if (weight.has_value()) stacked.expect_weight(*weight);
    if (h.has_value()) expect(*h, "h", {routed.m, r});
    Tensor dx = weight.has_value() ? empty({routed.m, k}, dy.scalar_type()) : empty({0}, dy.scalar_type()),
           da = x.has_value() ? empty({stacked.count, r, k}, lora_a.scalar_type()) : empty({0}, lora_a.scalar_type()),
           db = h.has_value() ? empty({stacked.count, n, r}, lora_b.scalar_type()) : empty({0}, lora_b.scalar_type());
    clear(da, 0, da.numel());  // experts without rows
    clear(db, 0, db.numel());
    const Tensor* seed = pointer(state);
    for (const auto& part : routed.parts) {
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
    if (weight.has_value()) clear(dx, routed.end * k, (routed.m - routed.end) * k);
    return {dx, da, db};
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
    m.impl("native_experts_forward", TORCH_BOX(&lora_kernels::experts_forward));
    m.impl("native_experts_backward", TORCH_BOX(&lora_kernels::experts_backward));
}
