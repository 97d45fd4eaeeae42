// What the operators of a layer and of a mixture's experts are made of: shapes, allocation, and the base product
// where the library's own is the quicker one.
#include "layer.h"

#include <vector>

#include "choice.h"

namespace lora_kernels {
namespace {

// The library's product, accumulated onto out (m, n): out += left (m, k) right (k, n).
void accumulate_product(const Tensor& out, const Tensor& left, const Tensor& right) {
    const auto sizes = left.sizes();
    if (out.numel() == 0 || sizes[1] == 0) return;
    const bool copied =
        sizes[1] % TILE_ROW != 0 && !left.is_contiguous() && library_reads_past_rows(dtype_of(left, "x"));
    const Tensor whole = copied ? torch::stable::contiguous(left) : left;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), whole.get(), right.get(), 1.0, 1.0));
}

// Whether W is multiplied by the kernels. One whose rows do not lie in one piece (Conv1D stores it as (K, N)) they
// would have to copy: that pays where the library's product is slow, and else the library's takes any strides.
bool multiplies(const Tensor& weight, Dtype compute, Pass pass, int64_t m, int64_t n, int64_t k) {
    const bool in_place = k <= 1 || weight.stride(1) == 1;
    return own_product(compute, pass, m, n, k) && (in_place || library_is_slow(compute));
}

}  // namespace

Tensor shrink_by(const Tensor& x, const Tensor& lora_a, double p, const Tensor* state, int64_t row) {
    const Dtype compute = dtype_of(x, "x");
    const Matrix tokens(x, "x");
    const int64_t m = tokens.rows, k = tokens.columns, r = rows_of(lora_a, "lora_a");
    expect(lora_a, "lora_a", {r, k});
    const Kernels& kernels = kernels_for(compute);
    const Adapter a(lora_a, "lora_a", adapter_of(compute));
    Tensor h = empty({m, r}, scalar_type_of(hidden_of(compute)));
    ShrinkCall call = {m,
                       k,
                       r,
                       tokens.data,
                       tokens.stride,
                       a.data,
                       dropout_of(state, p, row),
                       h.mutable_data_ptr(),
                       thread_count(),
                       nullptr};
    Scratch scratch(kernels.shrink_scratch(call));
    call.scratch = scratch.get();
    kernels.shrink(call);
    return h;
}

std::optional<std::tuple<Tensor, Tensor>> whole_forward(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                                        const Tensor& lora_b, const std::optional<Tensor>& bias,
                                                        double scaling, double p, const Tensor* state) {
    const Dtype compute = dtype_of(x, "x");
    const int64_t m = rows_of(x, "x"), k = columns_of(x, "x"), r = rows_of(lora_a, "lora_a"),
                  n = rows_of(lora_b, "lora_b");
    const Kernels& kernels = kernels_for(compute);
    FewForwardCall call = {m,  n,       k,       r,  nullptr, 0,       nullptr,        0,      {},
                           {}, nullptr, scaling, {}, nullptr, nullptr, thread_count(), nullptr};
    const auto stored = [](const Tensor& adapter, const char* name) -> Stored {
        return {adapter.const_data_ptr(), dtype_of(adapter, name), adapter.stride(0), adapter.stride(1)};
    };
    call.lora_a = stored(lora_a, "lora_a"), call.lora_b = stored(lora_b, "lora_b");
    if (!kernels.whole_forward(call) || !multiplies(weight, compute, Pass::forward, m, n, k)) return std::nullopt;
    expect(weight, "weight", {n, k}, compute);
    expect(lora_a, "lora_a", {r, k});
    expect(lora_b, "lora_b", {n, r});
    expect(bias, "bias", {n});
    const Matrix tokens(x, "x"), base(weight, "weight");
    const OptionalAdapter offset(bias, "bias", compute);
    Tensor h = empty({m, r}, scalar_type_of(hidden_of(compute))), y = empty({m, n}, x.scalar_type());
    call.x = tokens.data, call.ldx = tokens.stride, call.weight = base.data, call.ldw = base.stride;
    call.bias = offset.data, call.dropout = dropout_of(state, p), call.h = h.mutable_data_ptr();
    call.out = y.mutable_data_ptr();
    Scratch scratch(kernels.few_forward_scratch(call));
    call.scratch = scratch.get();
    kernels.few_forward(call);
    return std::make_tuple(h, y);
}

Tensor product_with(const Tensor& x, const Tensor& weight, const Tensor& lora_b, const Tensor& h,
                    const std::optional<Tensor>& bias, const std::optional<Tensor>& gain, double scaling,
                    std::optional<Tensor>* linear, const Tensor* out) {
    const Dtype compute = dtype_of(x, "x"), wide = hidden_of(compute);
    const Matrix tokens(x, "x"), low(h, "h");
    const int64_t m = tokens.rows, k = tokens.columns, r = columns_of(lora_b, "lora_b"), n = lora_b.sizes()[0];
    expect(weight, "weight", {n, k}, compute);
    expect(h, "h", {m, r}, wide);
    expect(bias, "bias", {n});
    expect(gain, "gain", {n});
    const Kernels& kernels = kernels_for(compute);
    const Adapter b(lora_b, "lora_b", adapter_of(compute));
    const OptionalAdapter offset(bias, "bias", compute), factor(gain, "gain", wide);
    const bool own = multiplies(weight, compute, Pass::forward, m, n, k), gained = gain.has_value(),
               kept = gained && linear != nullptr;
    std::optional<Matrix> base;
    if (own) base.emplace(weight, "weight");
    Tensor y = out == nullptr ? empty({m, n}, x.scalar_type()) : *out;
    if (kept) linear->emplace(empty({m, n}, x.scalar_type()));
    const Term term = {
        k,        r,          tokens.data, tokens.stride,           own ? base->data : nullptr, own ? base->stride : 0,
        low.data, low.stride, b.data,      dropout_of(nullptr, 0.0)};
    ProductCall call = {m,
                        n,
                        &term,
                        1,
                        true,
                        scaling,
                        offset.data,
                        factor.data,
                        kept ? (*linear)->mutable_data_ptr() : nullptr,
                        y.mutable_data_ptr(),
                        thread_count(),
                        nullptr};
    const Tensor& sums = kept ? **linear : y;
    if (!own && gained) {  // both come after the library's product
        call.bias = call.gain = call.linear = nullptr;
        call.out = sums.mutable_data_ptr();
    }
    Scratch scratch(kernels.product_scratch(call));
    call.scratch = scratch.get();
    kernels.product(call);
    if (!own) {
        accumulate_product(sums, tokens.tensor, transposed(weight));
        if (gained) {
            kernels.apply_gain(
                {m, n, sums.const_data_ptr(), factor.data, offset.data, y.mutable_data_ptr(), thread_count()});
        }
    }
    return y;
}

std::tuple<Tensor, Tensor, Tensor> grads_of_output(const Tensor& dy, const Tensor& lora_b,
                                                   const std::optional<Tensor>& h, const std::optional<Tensor>& bias,
                                                   double scaling, bool need_dh) {
    const Dtype compute = dtype_of(dy, "dy"), wide = hidden_of(compute);
    const Matrix outer(dy, "dy");
    const int64_t m = outer.rows, n = outer.columns, r = columns_of(lora_b, "lora_b");
    expect(lora_b, "lora_b", {n, r});
    expect(bias, "bias", {n});
    std::optional<Matrix> hidden;
    if (h.has_value()) {
        expect(*h, "h", {m, r}, wide);
        hidden.emplace(*h, "h");
    }
    const Kernels& kernels = kernels_for(compute);
    const Adapter b(lora_b, "lora_b", adapter_of(compute));
    Tensor dh = need_dh ? empty({m, r}, scalar_type_of(wide)) : empty({0}, scalar_type_of(wide));
    const AdapterGradient db(Result::db, h.has_value(), {n, r}, dtype_of(lora_b, "lora_b"), compute);
    const AdapterGradient dbias(Result::dbias, bias.has_value(), {n},
                                bias.has_value() ? dtype_of(*bias, "bias") : compute, compute);
    OutputGradsCall call = {m,
                            n,
                            r,
                            outer.data,
                            outer.stride,
                            b.data,
                            hidden ? hidden->data : nullptr,
                            hidden ? hidden->stride : 0,
                            scaling,
                            need_dh ? dh.mutable_data_ptr() : nullptr,
                            db.data,
                            dbias.data,
                            thread_count(),
                            nullptr};
    Scratch scratch(kernels.output_grads_scratch(call));
    call.scratch = scratch.get();
    if (need_dh || h.has_value() || bias.has_value()) kernels.output_grads(call);
    db.finish(kernels);
    dbias.finish(kernels);
    return {dh, db.result, dbias.result};
}

Tensor sum_of_input_grads(int64_t count, const Tensor* dys, const Tensor* weights, const Tensor* dhs,
                          const Tensor* lora_as, double p, const Tensor* states, int64_t row, const Tensor* out) {
    const Dtype compute = dtype_of(dys[0], "dy");
    const int64_t m = rows_of(dys[0], "dy"), k = columns_of(weights[0], "weight");
    const Kernels& kernels = kernels_for(compute);
    std::vector<Matrix> matrices;
    std::vector<Adapter> adapters;
    std::vector<Term> terms;
    std::vector<const Tensor*> lefts;
    matrices.reserve(3 * count), adapters.reserve(count), terms.reserve(count), lefts.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
        const Matrix& outer = matrices.emplace_back(dys[i], "dy");
        lefts.push_back(&outer.tensor);
        const int64_t n = outer.columns, r = rows_of(lora_as[i], "lora_a");
        expect(dys[i], "dy", {m, n}, compute);
        expect(weights[i], "weight", {n, k}, compute);
        expect(dhs[i], "dh", {m, r}, hidden_of(compute));
        expect(lora_as[i], "lora_a", {r, k});
        const Matrix& low = matrices.emplace_back(dhs[i], "dh");
        const Matrix* base = multiplies(weights[i], compute, Pass::backward, m, n, k)
                                 ? &matrices.emplace_back(weights[i], "weight")
                                 : nullptr;
        adapters.emplace_back(lora_as[i], "lora_a", adapter_of(compute));
        terms.push_back({n, r, outer.data, outer.stride, base ? base->data : nullptr, base ? base->stride : 0, low.data,
                         low.stride, adapters.back().data,
                         dropout_of(states == nullptr ? nullptr : states + i, p, row)});
    }
    Tensor dx = out == nullptr ? empty({m, k}, dys[0].scalar_type()) : *out;
    ProductCall call = {m,       k,       terms.data(),          count,          false,  1.0, nullptr,
                        nullptr, nullptr, dx.mutable_data_ptr(), thread_count(), nullptr};
    Scratch scratch(kernels.product_scratch(call));
    call.scratch = scratch.get();
    kernels.product(call);
    for (int64_t i = 0; i < count; ++i) {
        if (terms[i].weight == nullptr) accumulate_product(dx, *lefts[i], weights[i]);
    }
    return dx;
}

Tensor a_grad_in(Dtype own, const Tensor& dh, const Tensor& x, double p, const Tensor* state, int64_t row) {
    const Dtype compute = dtype_of(x, "x");
    const Matrix tokens(x, "x"), low(dh, "dh");
    const int64_t m = tokens.rows, k = tokens.columns, r = low.columns;
    expect(dh, "dh", {m, r}, hidden_of(compute));
    const Kernels& kernels = kernels_for(compute);
    const AdapterGradient da(Result::da, true, {r, k}, own, compute);
    AGradCall call = {m,
                      k,
                      r,
                      tokens.data,
                      tokens.stride,
                      low.data,
                      low.stride,
                      dropout_of(state, p, row),
                      da.data,
                      thread_count(),
                      nullptr};
    Scratch scratch(kernels.a_grad_scratch(call));
    call.scratch = scratch.get();
    kernels.a_grad(call);
    da.finish(kernels);
    return da.result;
}

}  // namespace lora_kernels
