// The number formats of the CUDA kernels: storage types, what they accumulate in, and conversions, without CUDA's own
// headers, so that a host compiler takes the kernels' bodies too (tests/native_host).
#pragma once

#include <cstdint>
#include <cstring>

#include "../common.h"

// LORA_TEAM: a function of the kernels' bodies. On the device only, where nvcc compiles; on the host, where a test
// does.
#if defined(__CUDACC__)
#define LORA_TEAM __device__ __forceinline__
#else
#define LORA_TEAM inline
#endif
#if defined(__CUDA_ARCH__)
#define LORA_UNROLL _Pragma("unroll")
#define LORA_UNROLL_STEPS _Pragma("unroll P::UNROLLED")
#else
#define LORA_UNROLL
#define LORA_UNROLL_STEPS
#endif

namespace lora_kernels {
namespace cuda {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// The dtypes that adapters, biases and their gradients may have, whatever the compute dtype is.
enum class DType : int { HALF = 0, BFLOAT16 = 1, FLOAT = 2, DOUBLE = 3 };

// Factor: what lora_a, lora_b, h and dh are staged as. SPLIT: whether h and dh enter a product as a high and a low
// part. WIDE: whether all operands do, so that more counts than T holds: fp16's range is too small for h, dh and
// adapters.
template <typename T>
struct Number {  // float
    using Sum = float;
    using Factor = T;
    static constexpr bool SPLIT = false, WIDE = false;
};
template <>
struct Number<double> {
    using Sum = double;
    using Factor = double;
    static constexpr bool SPLIT = false, WIDE = false;
};
template <>
struct Number<Half> {
    using Sum = float;
    using Factor = BFloat16;
    static constexpr bool SPLIT = true, WIDE = true;
};
template <>
struct Number<BFloat16> {
    using Sum = float;
    using Factor = BFloat16;
    static constexpr bool SPLIT = true, WIDE = false;
};

LORA_HD float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

LORA_HD uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

LORA_HD float widen(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }
LORA_HD float widen(float value) { return value; }
LORA_HD double widen(double value) { return value; }
LORA_HD float widen(Half value) {
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, rest = value.bits & 0x7FFFu;
    if (rest >= 0x7C00u) return float_of_bits(sign | 0x7F800000u | ((rest & 0x3FFu) << 13));  // infinities and NaN
    if (rest >= 0x0400u) return float_of_bits(sign | ((rest + 0x1C000u) << 13));
    const float small = static_cast<float>(rest) * float_of_bits(0x33800000u);  // subnormal: rest * 2^-24
    return sign ? -small : small;
#endif
}

LORA_HD void narrow(float value, float& out) { out = value; }
LORA_HD void narrow(double value, double& out) { out = value; }
LORA_HD void narrow(float value, BFloat16& out) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
    const uint32_t bits = bits_of_float(value);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    out.bits = static_cast<uint16_t>(nan ? 0x7FFFu : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
#endif
}
LORA_HD void narrow(float value, Half& out) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
    const uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7FFFFFFFu;
    uint32_t narrowed;
    if (rest > 0x7F800000u) {
        narrowed = 0x7FFFu;
    } else if (rest >= 0x477FF000u) {  // rounds beyond 65504
        narrowed = 0x7C00u;
    } else if (rest >= 0x38800000u) {  // normal: to nearest, ties to even
        narrowed = (rest + 0xFFFu + ((rest >> 13) & 1u) - 0x38000000u) >> 13;
    } else {  // subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits
        narrowed = bits_of_float(float_of_bits(rest) + 0.5f) - 0x3F000000u;
    }
    out.bits = static_cast<uint16_t>(sign | narrowed);
#endif
}
// From float64 by way of fp32, as torch converts.
LORA_HD void narrow(double value, float& out) { out = static_cast<float>(value); }
LORA_HD void narrow(double value, Half& out) { narrow(static_cast<float>(value), out); }
LORA_HD void narrow(double value, BFloat16& out) { narrow(static_cast<float>(value), out); }
LORA_HD void narrow(float value, double& out) { out = static_cast<double>(value); }

template <typename T, typename Value>
LORA_HD T narrowed(Value value) {
    T out;
    narrow(value, out);
    return out;
}

template <typename Sum>
LORA_HD bool is_finite(Sum value) {
    return value - value == Sum(0);
}

// Stores `value` as element `index` of an array of `dtype`.
template <typename Sum>
LORA_HD void store_as(void* data, DType dtype, int64_t index, Sum value) {
    switch (dtype) {
        case DType::HALF:
            narrow(value, static_cast<Half*>(data)[index]);
            break;
        case DType::BFLOAT16:
            narrow(value, static_cast<BFloat16*>(data)[index]);
            break;
        case DType::FLOAT:
            narrow(value, static_cast<float*>(data)[index]);
            break;
        case DType::DOUBLE:
            narrow(value, static_cast<double*>(data)[index]);
            break;
    }
}

// Element `index` of an array of `dtype`.
template <typename Sum>
LORA_HD Sum load_as(const void* data, DType dtype, int64_t index) {
    switch (dtype) {
        case DType::HALF:
            return static_cast<Sum>(widen(static_cast<const Half*>(data)[index]));
        case DType::BFLOAT16:
            return static_cast<Sum>(widen(static_cast<const BFloat16*>(data)[index]));
        case DType::FLOAT:
            return static_cast<Sum>(static_cast<const float*>(data)[index]);
        default:
            return static_cast<Sum>(static_cast<const double*>(data)[index]);
    }
}

}  // namespace cuda
}  // namespace lora_kernels
