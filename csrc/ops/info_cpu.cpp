// What the CPU operators run on this machine, for `python -m fusedpo`.
#include "cpu/row_kernels.h"
#include "ops/gemm_cpu.h"

namespace fusedpo {
namespace {

std::string cpu_info() {
  return std::string("{\"isa\": \"") + row_kernels().name + "\", \"bf16_gemm\": \"" +
         (native_bf16_gemm() ? "native" : "widened") + "\"}";
}

}  // namespace
}  // namespace fusedpo

// No tensor argument, so no backend is chosen: the kernel serves them all.
STABLE_TORCH_LIBRARY_IMPL(fusedpo, CompositeExplicitAutograd, m) {
  m.impl("cpu_info", TORCH_BOX(&fusedpo::cpu_info));
}
