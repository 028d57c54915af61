#define RIVER_BF16
#define RIVER_VNNI
#include "simd_avx512.h"

#include "kernels.inc.h"

namespace river {
extern const KernelSet avx512bf16_kernels;
constinit const KernelSet avx512bf16_kernels = make_kernel_set("avx512bf16");
}  // namespace river
