// The gated MLP's product σ(gate) * up and its gradients, in one read of what they are made of: bound by memory.
#pragma once

#include "products.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

LORA_INLINE FloatVector chosen(SignedWords mask, FloatVector yes, FloatVector no) {
    return (FloatVector)((mask & (SignedWords)yes) | (~mask & (SignedWords)no));
}

// e^v to 2 ulp; 0 below e^-87 and infinite above e^88; NaN stays.
LORA_INLINE FloatVector exponential(FloatVector v) {
    const FloatVector zero = {}, least = zero - 87.0f, most = zero + 88.0f;
    const SignedWords low = v<least, high = v> most;
    v = chosen(low, least, chosen(high, most, v));
    const FloatVector shift = zero + 12582912.0f;  // 1.5 2^23: adding it rounds to whole numbers
    const FloatVector moved = v * 1.44269504f + shift, whole = moved - shift;
    const FloatVector rest = (v - whole * 0.693145752f) - whole * 1.42860677e-6f;
    FloatVector sum = rest * (1.0f / 5040.0f) + 1.0f / 720.0f;
    sum = sum * rest + 1.0f / 120.0f;
    sum = sum * rest + 1.0f / 24.0f;
    sum = sum * rest + 1.0f / 6.0f;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    const SignedWords power = ((SignedWords)moved - (SignedWords)shift + 127) << 23;
    return chosen(high, zero + __builtin_inff(), chosen(low, zero, sum * (FloatVector)power));
}

LORA_INLINE DoubleVector exponential(DoubleVector v) {
    for (int i = 0; i < lanes<double>; ++i) v[i] = __builtin_exp(v[i]);
    return v;
}

// Φ(z), the normal distribution's; `density` is φ(z). Where |z| is large it is made of erfc, so that nothing cancels.
LORA_INLINE FloatVector normal(FloatVector z, FloatVector* density) {
    const FloatVector zero = {}, w = z * 0.707106781f, squares = w * w, falling = exponential(-squares);
    FloatVector inner = squares * -9.67359028e-6f + 1.12682537e-4f;
    inner = inner * squares - 8.48439639e-4f;
    inner = inner * squares + 5.22105349e-3f;
    inner = inner * squares - 2.68654376e-2f;
    inner = inner * squares + 1.12837830e-1f;
    inner = inner * squares - 3.76126379e-1f;
    inner = inner * squares + 1.12837923f;  // erf(w) / w, for w² <= 1
    const FloatVector size = chosen(w < zero, -w, w), t = 1.0f / (1.0f + 0.5f * size);
    FloatVector outer = t * -4.29582968e-2f + 2.35551059e-1f;
    outer = outer * t - 4.26371932e-1f;
    outer = outer * t + 2.38951057e-1f;
    outer = outer * t - 1.31491916e-2f;
    outer = outer * t + 2.00537667e-1f;
    outer = outer * t + 2.43110225e-1f;
    outer = outer * t + 2.82415807e-1f;
    outer = outer * t + 2.82082915e-1f;
    const FloatVector tail = 0.5f * outer * t * falling;  // erfc(|w|) / 2, for |w| >= 1
    *density = falling * 0.398942280f;
    return chosen(squares < zero + 1.0f, 0.5f + 0.5f * w * inner, chosen(w < zero, tail, 1.0f - tail));
}

LORA_INLINE DoubleVector normal(DoubleVector z, DoubleVector* density) {
    *density = exponential(-0.5 * z * z) * 0.39894228040143267794;
    for (int i = 0; i < lanes<double>; ++i) z[i] = 0.5 * __builtin_erfc(-0.70710678118654752440 * z[i]);
    return z;
}

LORA_INLINE FloatVector within(FloatVector z, float size) {
    const FloatVector zero = {};
    z = chosen(z < zero - size, zero - size, z);
    return chosen(z > zero + size, zero + size, z);
}
LORA_INLINE DoubleVector within(DoubleVector z, double size) {
    for (int i = 0; i < lanes<double>; ++i) z[i] = z[i] < -size ? -size : z[i] > size ? size : z[i];
    return z;
}

// 1 - part for part = 1 / (1 + falling), falling = e^-t, so that nothing cancels.
LORA_INLINE FloatVector rest_of(FloatVector part, FloatVector falling) {
    const FloatVector one = FloatVector{} + 1.0f;
    return chosen(falling < one, falling * part, one - part);
}
LORA_INLINE DoubleVector rest_of(DoubleVector part, DoubleVector falling) {
    for (int i = 0; i < lanes<double>; ++i) part[i] = falling[i] < 1.0 ? falling[i] * part[i] : 1.0 - part[i];
    return part;
}

// σ(z), and σ'(z) where SLOPE; the numbers are those of activations.GATES.
template <class T, int GATE, bool SLOPE>
LORA_INLINE Vector<T> gate_of(Vector<T> z, Vector<T>* slope) {
    const Vector<T> one = Vector<T>{} + T(1);
    if constexpr (GATE == 1) {
        Vector<T> density;
        const Vector<T> part = normal(z, &density);
        if constexpr (SLOPE) *slope = part + z * density;
        return z * part;
    } else if constexpr (GATE == 0) {
        const Vector<T> falling = exponential(-z), part = one / (one + falling);
        if constexpr (SLOPE) *slope = part * (one + z * rest_of(part, falling));
        return z * part;
    } else {  // (1 + tanh(u)) / 2 is the logistic function of 2 u; beyond 1e4 it is 0 or 1, and its slope 0
        const Vector<T> near = within(z, 1e4), squares = near * near;
        const T factor = T(1.59576912160573071176), cube = T(0.044715);
        const Vector<T> falling = exponential(-factor * near * (one + cube * squares)), part = one / (one + falling);
        if constexpr (SLOPE)
            *slope = part + near * part * rest_of(part, falling) * factor * (one + T(3) * cube * squares);
        return z * part;
    }
}

// a = σ(gate) * up; where `da` is there, dgate = da * up * σ'(gate) and dup = da * σ(gate) in its place.
template <class T, class E>
struct Gated {
    static constexpr int64_t COLUMNS = 1024;  // a task's unit

    int64_t m, n;
    const E *gate, *up, *da;
    int64_t ldgate, ldup, ldda;
    E *a, *dgate, *dup;
    int64_t ldout;

    template <int GATE, bool BACK>
    inline __attribute__((always_inline)) void vector(int64_t i, int64_t j, int64_t count) const {
        constexpr int VL = lanes<T>;
        const bool whole = count == VL;
        const auto take = [&](const E* from) { return whole ? load(from) : load_part(from, count); };
        const auto put = [&](Vector<T> value, E* to) {
            if (whole) return store(value, to);
            E padded[LORA_VECTOR_BYTES / sizeof(E)];
            store(value, padded);
            __builtin_memcpy(to, padded, static_cast<size_t>(count) * sizeof(E));
        };
        Vector<T> slope = {};
        const Vector<T> z = take(gate + i * ldgate + j), beside = take(up + i * ldup + j);
        const Vector<T> value = gate_of<T, GATE, BACK>(z, &slope);
        if constexpr (BACK) {
            const Vector<T> outer = take(da + i * ldda + j);
            put(outer * beside * slope, dgate + i * ldout + j);
            put(outer * value, dup + i * ldout + j);
        } else {
            put(value * beside, a + i * ldout + j);
        }
    }

    template <int GATE, bool BACK>
    void run(int64_t threads) const {
        const int64_t blocks = ceil_div(n, COLUMNS), all = m * blocks, tasks = least(threads, all);
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(all, 1, tasks, task);
            for (int64_t at = range.begin; at < range.end; ++at) {
                const int64_t i = at / blocks, begin = at % blocks * COLUMNS, end = least(begin + COLUMNS, n);
                for (int64_t j = begin; j < end; j += lanes<T>) vector<GATE, BACK>(i, j, least(lanes<T>, end - j));
            }
        });
    }

    template <bool BACK>
    void run(int64_t number, int64_t threads) const {
        if (number == 0) return run<0, BACK>(threads);
        if (number == 1) return run<1, BACK>(threads);
        run<2, BACK>(threads);
    }
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
