// How bf16 matrix products run on this CPU.
#pragma once

#include <cstdlib>
#include <string>

#include "ops/stable.h"

namespace fusedpo {

// True where torch's bf16 GEMM uses bf16 instructions. Elsewhere operand tiles are widened to fp32
// and multiplied there, which is exact in the products and many times faster than torch's bf16
// fallback. FUSEDPO_BF16_GEMM=native|widened in the environment decides otherwise.
inline bool native_bf16_gemm() {
  static const bool native = [] {
    const char* wanted = std::getenv("FUSEDPO_BF16_GEMM");
    if (wanted != nullptr && *wanted != '\0') {
      const std::string route(wanted);
      STD_TORCH_CHECK(route == "native" || route == "widened",
                      "FUSEDPO_BF16_GEMM must be native or widened; got ", route);
      return route == "native";
    }
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return false;
#endif
  }();
  return native;
}

// The type GEMM operands have for inputs rounded to `compute`. fp16 has no fast CPU GEMM in torch.
inline DType gemm_type(DType compute) {
  switch (compute) {
    case DType::bf16:
      return native_bf16_gemm() ? DType::bf16 : DType::f32;
    case DType::f16:
      return DType::f32;
    case DType::f32:
    case DType::f64:
      break;
  }
  return compute;
}

}  // namespace fusedpo
