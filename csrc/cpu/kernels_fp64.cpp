// The fp64 kernels; compiled once per instruction set.
#include "driver.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

extern const Kernels kernels_fp64;
const Kernels kernels_fp64 = KERNELS<double, double>;

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
