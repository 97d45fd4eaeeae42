// Which instruction set's kernels run (the best that this machine has, or the one that LORA_KERNELS_CPU_CAPABILITY
// names, if the machine has it), and which products they take over from the library (LORA_KERNELS_CPU_PRODUCT = own or
// library decides for all but those of few tokens). Both are read once.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace lora_kernels {

#define LORA_DECLARE(capability)                                                 \
    namespace capability {                                                       \
    extern const Kernels kernels_fp32, kernels_bf16, kernels_fp16, kernels_fp64; \
    }
LORA_DECLARE(portable)
LORA_DECLARE(avx2)
LORA_DECLARE(avx512)
LORA_DECLARE(avx512_bf16)
#undef LORA_DECLARE

namespace {

struct Candidate {
    const char* name;
    bool runs_here;
    const Kernels* kernels[4];  // in the order of Dtype
};

Candidate choose() {
#if defined(LORA_HAVE_AVX2)
    __builtin_cpu_init();
    [[maybe_unused]] const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                         __builtin_cpu_supports("avx512vl");
#endif
    const Candidate candidates[] = {
#if defined(LORA_HAVE_AVX512_BF16)
        {"avx512_bf16",
         avx512 && __builtin_cpu_supports("avx512bf16"),
         {&avx512::kernels_fp32, &avx512_bf16::kernels_bf16, &avx512::kernels_fp16, &avx2::kernels_fp64}},
#endif
#if defined(LORA_HAVE_AVX512)
        {"avx512", avx512, {&avx512::kernels_fp32, &avx512::kernels_bf16, &avx512::kernels_fp16, &avx2::kernels_fp64}},
#endif
#if defined(LORA_HAVE_AVX2)
        {"avx2", avx2, {&avx2::kernels_fp32, &avx2::kernels_bf16, &avx2::kernels_fp16, &avx2::kernels_fp64}},
#endif
        {"portable",
         true,
         {&portable::kernels_fp32, &portable::kernels_bf16, &portable::kernels_fp16, &portable::kernels_fp64}},
    };
    const char* named = std::getenv("LORA_KERNELS_CPU_CAPABILITY");
    for (const Candidate& candidate : candidates) {
        if (candidate.runs_here && (named == nullptr || std::strcmp(named, candidate.name) == 0)) return candidate;
    }
    for (const Candidate& candidate : candidates) {
        if (candidate.runs_here) return candidate;
    }
    return candidates[sizeof candidates / sizeof candidates[0] - 1];
}

const Candidate& chosen() {
    static const Candidate candidate = choose();
    return candidate;
}

enum class Choice { automatic, own, library };

Choice read_choice() {
    const char* named = std::getenv("LORA_KERNELS_CPU_PRODUCT");
    if (named != nullptr && std::strcmp(named, "own") == 0) return Choice::own;
    if (named != nullptr && std::strcmp(named, "library") == 0) return Choice::library;
    return Choice::automatic;
}

// Whether the library multiplies 16-bit matrices with instructions made for them; without, it runs at a fraction of
// its fp32 rate, and so below the kernels'.
bool library_is_quick(Dtype dtype) {
#if defined(LORA_HAVE_AVX2)
    __builtin_cpu_init();
    if (dtype == Dtype::bf16) return __builtin_cpu_supports("avx512bf16");
    if (dtype == Dtype::fp16) return __builtin_cpu_supports("avx512fp16");
#endif
    return true;
}

// Whether the library's fp32 products of tens of tokens were tuned for this maker's machines: MKL's for Intel's.
bool library_is_tuned_for_this() {
#if defined(LORA_HAVE_AVX2)
    __builtin_cpu_init();
    return __builtin_cpu_is("intel");
#else
    return true;
#endif
}

}  // namespace

bool own_product(Dtype dtype, int64_t m, int64_t n, int64_t k) {
    static const Choice choice = read_choice();
    static const bool quick_bf16 = library_is_quick(Dtype::bf16), quick_fp16 = library_is_quick(Dtype::fp16);
    static const bool tuned_for = library_is_tuned_for_this();
    if (m <= 16) return true;  // one read of W decides, and the library has no quicker one
    if (choice != Choice::automatic) return choice == Choice::own;
    if (m * n * k <= (1 << 22)) return true;  // overhead decides
    switch (dtype) {
        case Dtype::bf16:
            return !quick_bf16;
        case Dtype::fp16:
            return !quick_fp16;
        case Dtype::fp32:
            return !tuned_for && m <= 128;  // tried at 32 and 64 tokens on an AMD EPYC
        case Dtype::fp64:
            return false;
    }
    return false;
}

const Kernels& kernels_for(Dtype dtype) { return *chosen().kernels[static_cast<int>(dtype)]; }

}  // namespace lora_kernels
