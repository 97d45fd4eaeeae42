// One instance of the forward kernel for few tokens, as NVRTC compiles it: LORA_TILES, LORA_TOKENS (of 8), LORA_WARPS,
// LORA_DEPTH, LORA_LOAD and LORA_RAGGED are its configuration, LORA_SHARED_BYTES and LORA_THREADS what the host takes
// for it. The last two pointers are what every launch by csrc/launch ends with; nothing reads them.
#include "few_tokens.cuh"

using Instance = lora_kernels::few::Config<LORA_TILES, LORA_TOKENS, LORA_WARPS, LORA_DEPTH, LORA_LOAD, LORA_RAGGED>;

static_assert(Instance::SHARED == LORA_SHARED_BYTES && Instance::THREADS == LORA_THREADS,
              "what the host launches with");

extern "C" __global__ void __launch_bounds__(Instance::THREADS, Instance::BLOCKS)
    few_tokens_forward(const void* x, const void* weight, const void* lora_a, const void* lora_b, const void* bias,
                       const void* words, void* y, void* h, void* workspace, float scaling, float keep_scale, int m,
                       int n, int k, int r, int stride_x, int row_words, int rank, int a_is_fp32, int b_is_fp32,
                       int producers, int splits, int tiles, int blocks, int early, const void*, const void*) {
    using namespace lora_kernels::few;
    char* memory = (char*)workspace;
    const Params p = {(const bf16*)x,
                      (const bf16*)weight,
                      lora_a,
                      lora_b,
                      (const bf16*)bias,
                      (const unsigned*)words,
                      (bf16*)y,
                      h,
                      (float*)(memory + PART_OFFSET),
                      (unsigned*)(memory + FLAG_OFFSET),
                      (unsigned long long*)memory,
                      m,
                      n,
                      k,
                      r,
                      stride_x,
                      row_words,
                      rank,
                      a_is_fp32,
                      b_is_fp32,
                      producers,
                      splits,
                      tiles,
                      blocks,
                      early,
                      scaling,
                      keep_scale};
    forward<Instance>(p);
}
