// Who multiplies by W: the kernels, with the low-rank part inside, or torch's own product, which then accumulates onto
// the low-rank part.
#pragma once

#include "kernels.h"

namespace lora_kernels {

enum class Pass { forward, backward };  // x Wᵀ and dy W

// Whether the kernels multiply W (n, k) for m tokens. It takes a few nanoseconds, and within a process always answers
// alike once the library is loaded and its table installed: the bits of a result depend on it.
bool own_product(Dtype dtype, Pass pass, int64_t m, int64_t n, int64_t k);

// Whether the library has no instructions made for products of this dtype.
bool library_is_slow(Dtype dtype);

// Whether the library's product of this dtype was seen to read what lies between rows whose length is no multiple of
// TILE_ROW: with AMX.
constexpr int64_t TILE_ROW = 32;  // 16-bit values in a row of a tile
bool library_reads_past_rows(Dtype dtype);

// What this machine has, in words, as the model of the choice reads it: "own=avx512_bf16 intel avx512_bf16 amx_bf16".
const char* processor();

}  // namespace lora_kernels
