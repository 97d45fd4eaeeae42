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

// Dropout's mask. One call of Philox4x32 with 7 rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
// 2011) covers DROPOUT_GROUP consecutive elements of a row, 16 bits each; an element is kept where its 16 bits are at
// least the threshold. The specification is lora_kernels/reference.py, philox_keep_mask; it holds bit for bit.
constexpr int DROPOUT_GROUP = 8;
constexpr int PHILOX_ROUNDS = 7;
constexpr uint32_t PHILOX_MULTIPLIER_0 = 0xD2511F53u, PHILOX_MULTIPLIER_1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_WEYL_0 = 0x9E3779B9u, PHILOX_WEYL_1 = 0xBB67AE85u;

struct PhiloxWords {
    uint32_t w[4];
};

// The four output words for the 64-bit counter `index` (words 0 and 1), `stream` (words 2 and 3) and `key`.
LORA_HD PhiloxWords philox(uint64_t key, uint64_t stream, uint64_t index) {
    uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
    uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(PHILOX_MULTIPLIER_0) * c0;
        const uint64_t product1 = static_cast<uint64_t>(PHILOX_MULTIPLIER_1) * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += PHILOX_WEYL_0;
        k1 += PHILOX_WEYL_1;
    }
    return {{c0, c1, c2, c3}};
}

// The counter of the group that holds element (row, column) of a matrix with `columns` columns.
LORA_HD uint64_t dropout_group(int64_t row, int64_t column, int64_t columns) {
    return static_cast<uint64_t>(row) * static_cast<uint64_t>(ceil_div(columns, DROPOUT_GROUP)) +
           static_cast<uint64_t>(column / DROPOUT_GROUP);
}

// The 16 bits of element `j` (0..7) of a group.
LORA_HD uint32_t dropout_bits(const PhiloxWords& words, int j) { return (words.w[j / 2] >> (16 * (j % 2))) & 0xFFFFu; }

// round(65536 p), half to even as in Python, at most 65535.
LORA_HD uint32_t dropout_threshold(double p) {
    const double scaled = 65536.0 * p;
    uint32_t rounded = static_cast<uint32_t>(scaled);
    const double rest = scaled - rounded;
    if (rest > 0.5 || (rest == 0.5 && (rounded & 1u))) ++rounded;
    return rounded > 65535u ? 65535u : rounded;
}

}  // namespace lora_kernels
