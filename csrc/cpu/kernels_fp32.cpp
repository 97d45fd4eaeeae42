// The fp32 kernels; compiled once per instruction set.
#include "driver.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

extern const Kernels kernels_fp32;
const Kernels kernels_fp32 = KERNELS<float, float>;

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
