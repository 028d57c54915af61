#include "simd_neon.h"

#include "kernels.inc.h"

namespace river {
extern const KernelSet neon_kernels;
constinit const KernelSet neon_kernels = make_kernel_set("neon");
}  // namespace river
