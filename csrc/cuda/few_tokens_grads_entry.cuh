// The two kernels of backward for few tokens, as NVRTC compiles them: LORA_TOKENS (of 8) is the first one's
// configuration. Their last two pointers are what every launch by csrc/launch ends with; nothing reads them.
#include "few_tokens_grads.cuh"

using namespace lora_kernels::few;

static_assert(FirstGrads<LORA_TOKENS>::SHARED == LORA_SHARED_BYTES && LAST_SHARED == LORA_LAST_SHARED_BYTES &&
                  GRAD_THREADS == LORA_THREADS,
              "what the host launches with");

extern "C" __global__ void __launch_bounds__(GRAD_THREADS, 2)
    few_tokens_first_grads(const void* dy, const void* weight, const void* lora_b, const void* h, void* dx_parts,
                           void* dh_parts, void* db, void* dbias, float scaling, int m, int n, int k, int r,
                           int stride_dy, int rank, int b_is_fp32, int bias_is_fp32, int slices, int splits,
                           const void*, const void*) {
    const GradParams p = {(const bf16*)dy,
                          (const bf16*)weight,
                          lora_b,
                          h,
                          (float*)dx_parts,
                          (float*)dh_parts,
                          db,
                          dbias,
                          m,
                          n,
                          k,
                          r,
                          stride_dy,
                          rank,
                          b_is_fp32,
                          bias_is_fp32,
                          slices,
                          splits,
                          scaling};
    first_grads<LORA_TOKENS>(p);
}

extern "C" __global__ void __launch_bounds__(GRAD_THREADS)
    few_tokens_last_grads(const void* dx_parts, const void* dh_parts, const void* lora_a, const void* x,
                          const void* words, void* dx, void* da, float scaling, float keep_scale, int m, int k, int r,
                          int stride_x, int row_words, int a_is_fp32, int slices, int splits, int early, const void*,
                          const void*) {
    const LastParams p = {(const float*)dx_parts,
                          (const float*)dh_parts,
                          lora_a,
                          (const bf16*)x,
                          (const unsigned*)words,
                          (bf16*)dx,
                          da,
                          m,
                          k,
                          r,
                          stride_x,
                          row_words,
                          a_is_fp32,
                          slices,
                          splits,
                          early,
                          scaling,
                          keep_scale};
    last_grads(p);
}
