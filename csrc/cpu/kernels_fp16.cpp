// The fp16 kernels; compiled once per instruction set.
#include "driver.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

extern const Kernels kernels_fp16;
const Kernels kernels_fp16 = KERNELS<float, fp16>;

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
