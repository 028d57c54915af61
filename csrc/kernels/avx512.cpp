#include "simd_avx512.h"

#include "kernels.inc.h"

namespace river {
extern const KernelSet avx512_kernels;
constinit const KernelSet avx512_kernels = make_kernel_set("avx512");
}  // namespace river
