// Which kernel sets this processor can run. Compiled without special flags.
#include "kernel_set.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace river {

extern const KernelSet portable_kernels;
#if defined(RIVER_X86)
extern const KernelSet avx2_kernels, avx512_kernels, avx512bf16_kernels, amx_kernels;
#elif defined(RIVER_ARM)
extern const KernelSet neon_kernels;
#endif

#if defined(RIVER_X86)
namespace {

bool has_amx() {
#if defined(__linux__)
  // Linux gives a process the tile registers when it asks for them.
  unsigned eax, ebx, ecx, edx;
  __asm__ volatile("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(7), "c"(0));
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((edx & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

int available_kernel_sets(const KernelSet** sets) {
  int count = 0;
#if defined(RIVER_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  if (bf16 && has_amx()) sets[count++] = &amx_kernels;
  if (bf16) sets[count++] = &avx512bf16_kernels;
  if (avx512) sets[count++] = &avx512_kernels;
  if (avx2) sets[count++] = &avx2_kernels;
#elif defined(RIVER_ARM)
  sets[count++] = &neon_kernels;
#endif
  sets[count++] = &portable_kernels;
  return count;
}

}  // namespace river
