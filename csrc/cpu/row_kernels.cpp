// Picks the kernels' instruction set.
#include "cpu/row_kernels.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace fusedpo {

#define FUSEDPO_DECLARE_ISA(name) \
  namespace name {                \
  extern const RowKernels table;  \
  }
FUSEDPO_DECLARE_ISA(generic)
#ifdef FUSEDPO_HAVE_AVX2
FUSEDPO_DECLARE_ISA(avx2)
#endif
#ifdef FUSEDPO_HAVE_AVX512
FUSEDPO_DECLARE_ISA(avx512)
#endif

const RowKernels* row_kernels(const char* name) {
  if (std::strcmp(name, "generic") == 0) return &generic::table;
#ifdef FUSEDPO_HAVE_AVX2
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return &avx2::table;
  }
#endif
#ifdef FUSEDPO_HAVE_AVX512
  if (std::strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return &avx512::table;
  }
#endif
  return nullptr;
}

const RowKernels& row_kernels() {
  static const RowKernels* const best = [] {
    const char* wanted = std::getenv("FUSEDPO_CPU_ISA");
    if (wanted != nullptr && *wanted != '\0') {
      if (const RowKernels* kernels = row_kernels(wanted)) return kernels;
      throw std::runtime_error(std::string("FUSEDPO_CPU_ISA must be generic, avx2 or avx512, and "
                                           "built for and supported by this processor; got ") +
                               wanted);
    }
    for (const char* name : {"avx512", "avx2"}) {
      if (const RowKernels* kernels = row_kernels(name)) return kernels;
    }
    return &generic::table;
  }();
  return *best;
}

}  // namespace fusedpo
