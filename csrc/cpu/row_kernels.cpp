// Picks the kernels' instruction set and finishes rows.
#include "cpu/row_kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
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

RowResult finish_row(const RowStats& s, int64_t vocab) {
  const double mean = s.sum / static_cast<double>(vocab);
  const bool is_top1 = s.seen && !s.beaten;
  if (!std::isfinite(s.max)) {  // nothing to normalise by: NaN, as in torch, in value and gradient
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {nan, nan, nan, mean, is_top1, s.max, nan, nan};
  }
  const double target = std::exp(s.target - s.max);  // 1 when the label is the maximum
  const double sum = s.rest + target;
  const bool label_is_max = s.target == s.max;
  RowResult r;
  r.log_sum = label_is_max ? std::log1p(s.rest) : std::log(sum);
  r.logp = (s.target - s.max) - r.log_sum;
  const double target_z = target == 0.0 ? 0.0 : target * (s.target - s.max);
  r.entropy = r.log_sum - (s.rest_z + target_z) / sum;
  const double log_sum_sq =
      label_is_max ? std::log1p(s.rest_sq) : std::log(s.rest_sq + target * target);
  r.log_sum_sq_probs = log_sum_sq - 2.0 * r.log_sum;
  r.mean_logits = mean;
  r.is_top1 = is_top1;
  r.max = s.max;
  r.rest_share = s.rest / sum;
  return r;
}

const RowKernels* row_kernels(const char* name) {
  if (std::strcmp(name, "generic") == 0) return &generic::table;
#ifdef FUSEDPO_HAVE_AVX2
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma")) {
    return &avx2::table;
  }
#endif
#ifdef FUSEDPO_HAVE_AVX512
  if (std::strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
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
