// Which instruction set's kernels run: the best that this machine has, or the one that LORA_KERNELS_CPU_CAPABILITY
// names, if the machine has it. It is read once.
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
LORA_DECLARE(amx)
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
    const char* named = std::getenv("LORA_KERNELS_CPU_CAPABILITY");
    const auto wanted = [&](const char* name) { return named == nullptr || std::strcmp(named, name) == 0; };
    const Candidate candidates[] = {
#if defined(LORA_HAVE_AMX)
        {"amx",
         avx512 && __builtin_cpu_supports("avx512bf16") && wanted("amx") && amx_obstacle() == nullptr,
         {&avx512::kernels_fp32, &amx::kernels_bf16, &avx512::kernels_fp16, &avx2::kernels_fp64}},
#endif
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
    for (const Candidate& candidate : candidates) {
        if (candidate.runs_here && wanted(candidate.name)) return candidate;
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

}  // namespace

const char* capability_name() { return chosen().name; }

const Kernels& kernels_for(Dtype dtype) { return *chosen().kernels[static_cast<int>(dtype)]; }

}  // namespace lora_kernels

// What `lora-kernels info` asks the loaded library: the instruction set that runs, and why it is not AMX, or "".
extern "C" {
__attribute__((visibility("default"))) const char* lora_kernels_cpu_capability() {
    return lora_kernels::capability_name();
}
__attribute__((visibility("default"))) const char* lora_kernels_cpu_amx_obstacle() {
    const char* obstacle = lora_kernels::amx_obstacle();
    return obstacle == nullptr ? "" : obstacle;
}
}
