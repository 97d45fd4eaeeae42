// The kernels for fp64, which is for checking gradients: wider vectors than AVX2's are not worth their compilation.
#include "driver.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

extern const Kernels kernels_fp64;
#if !defined(__AVX512F__)
const Kernels kernels_fp64 = KERNELS<double, double>;
#endif

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
