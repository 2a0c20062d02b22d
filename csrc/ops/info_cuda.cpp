// What the CUDA operators were linked with and what the driver serves, for `python -m fusedpo`.
#include "ops/cuda_device.h"

namespace fusedpo {
namespace {

std::string cuda_info() {
  return "{\"runtime\": " + std::to_string(cuda::runtime_version()) +
         ", \"driver\": " + std::to_string(cuda::driver_version()) + "}";
}

}  // namespace
}  // namespace fusedpo

// No tensor argument, so no backend is chosen: the kernel serves them all.
STABLE_TORCH_LIBRARY_IMPL(fusedpo, CompositeExplicitAutograd, m) {
  m.impl("cuda_info", TORCH_BOX(&fusedpo::cuda_info));
}
