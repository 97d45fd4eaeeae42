// A mixture's experts in one operator a pass: the tokens' rows, gate_up_proj, σ(gate) * up, down_proj and the sum over
// a token's experts, one expert after the other. Of what lies between only gate_up_proj's output is kept.
#include "experts.h"

namespace lora_kernels {
namespace {

// A projection and its adapters, of which W may be a view.
struct Projection {
    const Tensor &weight, &lora_a, &lora_b;
    double scaling, p;
    const Tensor* state;
    Stacked stacked;

    Projection(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling, double p,
               const std::optional<Tensor>& state)
        : weight(weight),
          lora_a(lora_a),
          lora_b(lora_b),
          scaling(scaling),
          p(p),
          state(pointer(state)),
          stacked(lora_a, lora_b) {
        stacked.expect_weight(weight);
    }

    // out = x Wᵀ + s h Bᵀ of an expert's rows x; h to `hs`, from the row where the expert begins.
    void forward(const Tensor& x, const Routed::Part& part, const Tensor& hs, const Tensor& out) const {
        const Tensor h = shrink_by(x, of_expert(lora_a, part.expert), p, state, part.begin);
        product_with(x, weight_of(weight, part.expert, x.scalar_type()), of_expert(lora_b, part.expert), h,
                     std::nullopt, std::nullopt, scaling, nullptr, &out);
        put(h, hs, part.begin * stacked.r);
    }

    // dh of an expert's dy; db, where it is due, to `to`.
    Tensor output_grads(const Tensor& dy, const Routed::Part& part, const Tensor& h, const Tensor* to) const {
        const std::optional<Tensor> low = to == nullptr ? std::nullopt : std::optional(h);
        const auto [dh, db, unused] =
            grads_of_output(dy, of_expert(lora_b, part.expert), low, std::nullopt, scaling, true);
        if (to != nullptr) put(db, *to, part.expert * stacked.n * stacked.r);
        return dh;
    }

    void a_grad(const Tensor& dh, const Tensor& x, const Routed::Part& part, const Tensor& to) const {
        put(a_grad_in(dtype_of(lora_a, "lora_a"), dh, x, p, state, part.begin), to, part.expert * lora_a_size());
    }

    // out = dx of an expert's dy.
    void input_grad(const Tensor& dy, const Tensor& dh, const Routed::Part& part, const Tensor& out) const {
        const Tensor base = weight_of(weight, part.expert, dy.scalar_type()), a = of_expert(lora_a, part.expert);
        sum_of_input_grads(1, &dy, &base, &dh, &a, p, state, part.begin, &out);
    }

    int64_t lora_a_size() const { return stacked.r * stacked.k; }
};

// What both passes are given.
struct Mixture {
    const Projection &up, &down;
    int64_t number, tokens, k;
    Dtype compute, wide;
    Routed routed;
    std::vector<int64_t> token;  // of each sorted row
    const int64_t* slots;
    Adapter weights;  // T (tokens, k)

    Mixture(const Projection& up, const Projection& down, const Tensor& x, const Tensor& offsets, const Tensor& given,
            const Tensor& weights, int64_t number)
        : up(up),
          down(down),
          number(number),
          tokens(rows_of(weights, "weights")),
          k(columns_of(weights, "weights")),
          compute(dtype_of(x, "x")),
          wide(hidden_of(compute)),
          routed(offsets, up.stacked.count, tokens * k),
          weights(weights, "weights", wide) {
        STD_TORCH_CHECK(up.stacked.count == down.stacked.count && up.stacked.n == 2 * down.stacked.k,
                        "up's (E, 2 I, H) and down's (E, H, I) must be of one number of experts and one I.");
        STD_TORCH_CHECK(rows_of(x, "x") == tokens && x.sizes()[1] == up.stacked.k,
                        "x must be (T, H) of up's H, and weights (T, k).");
        STD_TORCH_CHECK(number >= 0 && number <= 2, "the gate's number must be 0, 1 or 2, and ", number, " was given.");
        STD_TORCH_CHECK(given.scalar_type() == ScalarType::Long && given.is_contiguous() && given.numel() == tokens * k,
                        "slots must be int64 (T k,) and contiguous.");
        slots = static_cast<const int64_t*>(given.const_data_ptr());
        token.reserve(static_cast<size_t>(routed.end) + 1);
        for (int64_t i = 0; i < routed.end; ++i) {
            STD_TORCH_CHECK(slots[i] >= 0 && slots[i] < tokens * k, "slots must be places of weights.");
            token.push_back(slots[i] / k);
        }
        token.push_back(0);  // nobody's: of no row there is a pointer too
    }

    int64_t inner() const { return down.stacked.k; }

    // The factors of an expert's rows, T, to `out`.
    void factors(const Routed::Part& part, void* out) const {
        const size_t size = size_of(wide);
        for (int64_t i = 0; i < part.count; ++i) {
            std::memcpy(static_cast<char*>(out) + static_cast<size_t>(i) * size,
                        static_cast<const char*>(weights.data) + static_cast<size_t>(slots[part.begin + i]) * size,
                        size);
        }
    }

    // An expert's d_weights, T, to their places.
    void scatter(const Routed::Part& part, const void* from, const Tensor& to) const {
        const size_t size = size_of(wide);
        for (int64_t i = 0; i < part.count; ++i) {
            std::memcpy(static_cast<char*>(to.mutable_data_ptr()) + static_cast<size_t>(slots[part.begin + i]) * size,
                        static_cast<const char*>(from) + static_cast<size_t>(i) * size, size);
        }
    }

    // σ(gate) * up of rows (gate, up); where `da` is there its gradients instead.
    void gated(const Tensor& joined, const Tensor* da, const Tensor& out) const {
        const int64_t half = inner(), offset = half * static_cast<int64_t>(size_of(compute));
        const char* gate = static_cast<const char*>(joined.const_data_ptr());
        char* to = static_cast<char*>(out.mutable_data_ptr());
        GatedCall call = {joined.sizes()[0], half, number, gate,    2 * half, gate + offset, 2 * half,
                          nullptr,           half, to,     nullptr, nullptr,  half,          thread_count()};
        if (da != nullptr) {
            call.da = da->const_data_ptr(), call.a = nullptr, call.dgate = to, call.dup = to + offset;
            call.ldout = 2 * half;
        }
        kernels_for(compute).gated(call);
    }

    void add_rows(const Routed::Part& part, const Tensor& rows, const void* factors, const Tensor& sums) const {
        kernels_for(compute).weighted_sum({part.count, sums.sizes()[1], rows.const_data_ptr(),
                                           token.data() + part.begin, factors, sums.mutable_data_ptr(),
                                           thread_count()});
    }
};

// Sums in T, from zero, and what they leave as.
struct Sums {
    Tensor sums;
    ScalarType dtype;

    Sums(int64_t rows, int64_t columns, Dtype wide, ScalarType dtype)
        : sums(empty({rows, columns}, scalar_type_of(wide))), dtype(dtype) {
        clear(sums, 0, sums.numel());
    }
    Tensor rounded(Dtype compute) const {
        if (sums.scalar_type() == dtype) return sums;
        Tensor out = empty({sums.sizes()[0], sums.sizes()[1]}, dtype);
        struct Call {
            const Kernels& kernels;
            const char* from;
            char* to;
            Dtype dtype;
            int64_t count, tasks, wide, narrow;
        } call = {kernels_for(compute),
                  static_cast<const char*>(sums.const_data_ptr()),
                  static_cast<char*>(out.mutable_data_ptr()),
                  dtype_of(out, "a result"),
                  sums.numel(),
                  thread_count(),
                  static_cast<int64_t>(size_of(dtype_of(sums, "sums"))),
                  static_cast<int64_t>(size_of(dtype_of(out, "a result")))};
        parallel(
            call.tasks,
            [](void* opaque, int64_t task) {
                const Call& to_do = *static_cast<const Call*>(opaque);
                const int64_t begin = to_do.count * task / to_do.tasks, end = to_do.count * (task + 1) / to_do.tasks;
                to_do.kernels.gradient(to_do.from + begin * to_do.wide, end - begin, to_do.dtype,
                                       to_do.to + begin * to_do.narrow);
            },
            &call);
        return out;
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> experts_mlp_forward(
    const Tensor& x, const Tensor& up_weight, const Tensor& up_a, const Tensor& up_b, const Tensor& down_weight,
    const Tensor& down_a, const Tensor& down_b, const Tensor& offsets, const Tensor& slots, const Tensor& weights,
    double up_scaling, double down_scaling, double up_p, double down_p, const std::optional<Tensor>& up_state,
    const std::optional<Tensor>& down_state, int64_t number, bool wide) {
    const Projection up(up_weight, up_a, up_b, up_scaling, up_p, up_state),
        down(down_weight, down_a, down_b, down_scaling, down_p, down_state);
    const Mixture of(up, down, x, offsets, slots, weights, number);
    const ScalarType dtype = x.scalar_type(), hidden = scalar_type_of(of.wide);
    const Routed& routed = of.routed;
    const Rows rows(x, of.token.data(), routed, up.stacked.k);
    const int64_t longest = routed.longest();
    Tensor joined = empty({routed.m, up.stacked.n}, dtype), up_h = empty({routed.m, up.stacked.r}, hidden),
           down_h = empty({routed.m, down.stacked.r}, hidden);
    const Tensor acts = empty({longest, of.inner()}, dtype), outs = empty({longest, down.stacked.n}, dtype),
                 factors = empty({longest}, hidden);
    const Sums y(of.tokens, down.stacked.n, of.wide, wide ? hidden : dtype);
    for (const auto& part : routed.parts) {
        const Tensor own = rows.of(part), both = rows_from(joined, part.begin, part.count),
                     act = rows_from(acts, 0, part.count), out = rows_from(outs, 0, part.count);
        up.forward(own, part, up_h, both);
        of.gated(both, nullptr, act);
        down.forward(act, part, down_h, out);
        of.factors(part, factors.mutable_data_ptr());
        of.add_rows(part, out, factors.const_data_ptr(), y.sums);
    }
    const int64_t rest = routed.m - routed.end;
    clear(joined, routed.end * up.stacked.n, rest * up.stacked.n);
    clear(up_h, routed.end * up.stacked.r, rest * up.stacked.r);
    clear(down_h, routed.end * down.stacked.r, rest * down.stacked.r);
    return {y.rounded(of.compute), joined, up_h, down_h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_mlp_backward(
    const Tensor& dy, const Tensor& x, const Tensor& joined, const Tensor& up_weight, const Tensor& up_a,
    const Tensor& up_b, const Tensor& down_weight, const Tensor& down_a, const Tensor& down_b, const Tensor& offsets,
    const Tensor& slots, const Tensor& weights, const Tensor& up_h, const Tensor& down_h, double up_scaling,
    double down_scaling, double up_p, double down_p, const std::optional<Tensor>& up_state,
    const std::optional<Tensor>& down_state, int64_t number, bool need_x, bool need_weights, bool need_up,
    bool need_down) {
    const Projection up(up_weight, up_a, up_b, up_scaling, up_p, up_state),
        down(down_weight, down_a, down_b, down_scaling, down_p, down_state);
    const Mixture of(up, down, x, offsets, slots, weights, number);
    const ScalarType dtype = x.scalar_type(), hidden = scalar_type_of(of.wide);
    const Kernels &kernels = kernels_for(of.compute), &wide = kernels_for(of.wide);
    const Routed& routed = of.routed;
    expect(dy, "dy", {of.tokens, down.stacked.n}, of.compute);
    expect(joined, "joined", {routed.m, up.stacked.n}, of.compute);
    expect(up_h, "h", {routed.m, up.stacked.r}, of.wide);
    expect(down_h, "h", {routed.m, down.stacked.r}, of.wide);
    STD_TORCH_CHECK(joined.is_contiguous(), "joined must be contiguous.");
    const Rows outer(dy, of.token.data(), routed, down.stacked.n);
    std::optional<Rows> rows;
    if (need_up) rows.emplace(x, of.token.data(), routed, up.stacked.k);
    const bool inward = need_x || need_up, activations = need_down || need_weights;
    const int64_t longest = routed.longest(), inner = of.inner();
    const auto cleared = [](const Tensor& like, bool due) {
        Tensor out = due ? empty({like.sizes()[0], like.sizes()[1], like.sizes()[2]}, like.scalar_type())
                         : empty({0}, like.scalar_type());
        clear(out, 0, out.numel());  // experts without rows
        return out;
    };
    Tensor d_up_a = cleared(up_a, need_up), d_up_b = cleared(up_b, need_up), d_down_a = cleared(down_a, need_down),
           d_down_b = cleared(down_b, need_down);
    const Sums dx(need_x ? of.tokens : 0, up.stacked.k, of.wide, dtype),
        d_weights(need_weights ? of.tokens : 0, of.k, of.wide, weights.scalar_type());
    const Tensor acts = empty({activations ? longest : 0, inner}, dtype), d_acts = empty({longest, inner}, dtype),
                 d_joineds = empty({inward ? longest : 0, up.stacked.n}, dtype),
                 dxs = empty({need_x ? longest : 0, up.stacked.k}, dtype), factors = empty({longest}, hidden),
                 products = empty({longest}, hidden), hs = empty({longest, down.stacked.r}, hidden);
    for (const auto& part : routed.parts) {
        const Tensor own_dy = outer.of(part), both = rows_from(joined, part.begin, part.count);
        const void* factor = factors.const_data_ptr();
        of.factors(part, factors.mutable_data_ptr());
        // db = s (w dy)ᵀ h = s dyᵀ (w h), and likewise of da: only what is narrow is weighed.
        const Tensor h = rows_from(hs, 0, part.count);
        if (need_down) {
            put(rows_from(down_h, part.begin, part.count), h, 0);
            wide.weigh({part.count, down.stacked.r, nullptr, factor, h.mutable_data_ptr(), nullptr, thread_count()});
        }
        const Tensor dh = down.output_grads(own_dy, part, h, need_down ? &d_down_b : nullptr);
        const Tensor act = rows_from(acts, 0, activations ? part.count : 0), d_act = rows_from(d_acts, 0, part.count);
        if (activations) of.gated(both, nullptr, act);
        if (inward || need_weights) {
            down.input_grad(own_dy, dh, part, d_act);
            kernels.weigh({part.count, inner, act.const_data_ptr(), factor, d_act.mutable_data_ptr(),
                           need_weights ? products.mutable_data_ptr() : nullptr, thread_count()});
        }
        if (need_weights) of.scatter(part, products.const_data_ptr(), d_weights.sums);
        if (need_down) {
            wide.weigh({part.count, down.stacked.r, nullptr, factor, dh.mutable_data_ptr(), nullptr, thread_count()});
            down.a_grad(dh, act, part, d_down_a);
        }
        if (!inward) continue;
        const Tensor d_both = rows_from(d_joineds, 0, part.count);
        of.gated(both, &d_act, d_both);
        const Tensor up_low = rows_from(up_h, part.begin, part.count),
                     up_dh = up.output_grads(d_both, part, up_low, need_up ? &d_up_b : nullptr);
        if (need_up) up.a_grad(up_dh, rows->of(part), part, d_up_a);
        if (need_x) {
            const Tensor out = rows_from(dxs, 0, part.count);
            up.input_grad(d_both, up_dh, part, out);
            of.add_rows(part, out, nullptr, dx.sums);
        }
    }
    return {need_x ? dx.rounded(of.compute) : empty({0}, dtype),
            need_weights ? d_weights.rounded(of.compute) : empty({0}, weights.scalar_type()),
            d_up_a,
            d_up_b,
            d_down_a,
            d_down_b};
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
    m.impl("native_experts_mlp_forward", TORCH_BOX(&lora_kernels::experts_mlp_forward));
    m.impl("native_experts_mlp_backward", TORCH_BOX(&lora_kernels::experts_mlp_backward));
}
