// The bf16 kernels; compiled once per instruction set.
#include "driver.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

extern const Kernels kernels_bf16;
const Kernels kernels_bf16 = KERNELS<float, bf16>;

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
