#include "simd_portable.h"

#include "kernels.inc.h"

namespace river {
extern const KernelSet portable_kernels;
constinit const KernelSet portable_kernels = make_kernel_set("portable");
}  // namespace river
