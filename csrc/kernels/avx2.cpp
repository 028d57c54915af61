#include "simd_avx2.h"

#include "kernels.inc.h"

namespace river {
extern const KernelSet avx2_kernels;
constinit const KernelSet avx2_kernels = make_kernel_set("avx2");
}  // namespace river
