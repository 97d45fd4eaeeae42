// The kernels that add up in fp32: compute dtypes fp32, bf16 and fp16. Compiled once per instruction set; the one with
// bf16 products differs in bf16 alone.
#include "driver.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

extern const Kernels kernels_fp32, kernels_bf16, kernels_fp16;
const Kernels kernels_bf16 = KERNELS<float, bf16>;
#if !defined(__AVX512BF16__)
const Kernels kernels_fp32 = KERNELS<float, float>;
const Kernels kernels_fp16 = KERNELS<float, fp16>;
#endif

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
