// What the CPU and the CUDA library share: index helpers and dropout's generator. Host- and device-callable; includes
// no torch. Everything has internal linkage, because the CPU kernels are compiled once per instruction set and the
// linker must never take one set's copy of a function for another's.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LORA_HD static __host__ __device__ __forceinline__
#else
#define LORA_HD static inline
#endif

namespace lora_kernels {

LORA_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LORA_HD int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Dropout's mask, one bit an element. 16 random words of Philox4x32 with 7 rounds (Salmon et al., "Parallel Random
// Numbers: As Easy as 1, 2, 3", 2011) make the bits of DROPOUT_WORD neighbouring columns, by a majority for each binary
// digit of `keep`, 65536 times the probability that an element is kept. The specification is
// lora_kernels/packed_mask.py; it holds bit for bit.
constexpr int DROPOUT_WORD = 32;
constexpr uint32_t KEEP_ALL = 65536;
constexpr int PHILOX_ROUNDS = 7, PHILOX_CALLS = 4;  // calls for a word, with four digits each
constexpr uint32_t PHILOX_MULTIPLIER_0 = 0xD2511F53u, PHILOX_MULTIPLIER_1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_WEYL_0 = 0x9E3779B9u, PHILOX_WEYL_1 = 0xBB67AE85u;

// 65536 - round(65536 p), half to even as in Python, at least 1.
LORA_HD uint32_t dropout_keep(double p) {
    const double scaled = 65536.0 * p;
    uint32_t rounded = static_cast<uint32_t>(scaled);
    const double rest = scaled - rounded;
    if (rest > 0.5 || (rest == 0.5 && (rounded & 1u))) ++rounded;
    return rounded > 65535u ? 1u : KEEP_ALL - rounded;
}

// The first call whose random words count: while all digits of `keep` are 0, so are all bits. 4 where nothing is drawn.
LORA_HD int first_call(uint32_t keep) {
    int call = 0;
    while (call < PHILOX_CALLS && keep % (16u << 4 * call) == 0) ++call;
    return call;
}

}  // namespace lora_kernels
