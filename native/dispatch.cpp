#include "dispatch.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace orpo {

#define ORPO_DECLARE(isa) \
  namespace isa {         \
  extern const Kernels kernels; \
  }

#if defined(__x86_64__)
ORPO_DECLARE(baseline)
ORPO_DECLARE(avx2)
ORPO_DECLARE(avx512)
#elif defined(__aarch64__)
ORPO_DECLARE(neon)
#else
ORPO_DECLARE(baseline)
#endif

#if defined(__x86_64__)
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<const Kernels*> supported_kernels() {
#if defined(__x86_64__)
  // These ask the operating system as well, whether it saves the registers.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  std::vector<const Kernels*> found;
  if (has_avx512) found.push_back(&avx512::kernels);
  if (has_avx2) found.push_back(&avx2::kernels);
  found.push_back(&baseline::kernels);
  return found;
#elif defined(__aarch64__)
  return {&neon::kernels};
#else
  return {&baseline::kernels};
#endif
}

const Kernels& select_kernels(const std::string& isa) {
  const std::vector<const Kernels*> supported = supported_kernels();
  if (isa.empty()) return *supported.front();
  std::string names;
  for (const Kernels* kernels : supported) {
    if (isa == kernels->isa) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::invalid_argument("ORPO_KERNELS_ISA is '" + isa + "', this processor has " + names);
}

}  // namespace orpo
