// The twin of csrc/ops/cuda_device.h: the CUDA operators on CPU tensors, with kernels that the host
// emulates. Chunks are small, so that a small problem has several.
#pragma once

#include <cstdlib>
#include <string>

#include "cuda/stream.h"
#include "cuda_host.h"
#include "ops/stable.h"

#define FUSEDPO_CUDA_KEY CPU

namespace fusedpo {

constexpr int64_t kChunkBytes = int64_t{16} << 10;
constexpr int64_t kCostlyChunkBytes = int64_t{24} << 10;
constexpr int64_t kSmallestChunk = 16;
constexpr int64_t kChunkStep = 4;

// FUSEDPO_TEST_CAPTURING=1 pretends that every operator is captured into a graph.
class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& /*t*/) {
    const char* pretends = std::getenv("FUSEDPO_TEST_CAPTURING");
    capturing = pretends != nullptr && std::string(pretends) == "1";
    cuda_host::set_capturing(stream, capturing);  // waiting is an error then
  }
  ~CudaDevice() { cuda_host::set_capturing(stream, false); }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  cuda::Stream stream = nullptr;
  bool capturing = false;
};

inline void check_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(out.size(0) == a.size(0) && out.size(1) == b.size(1) && a.size(1) == b.size(0),
                  "a product's shapes do not match");
}

// t in fp32, with its strides' order: what a tensor core multiplies is exact in it.
inline Tensor widened(const Tensor& t) {
  Tensor wide = torch::stable::new_empty(t, sizes_of(t), ScalarType::Float);
  copy_to(wide, t);
  return wide;
}

// The CPU has no product of half types with an fp32 result, and rounds partial sums in places; a
// GPU sums in fp32 and rounds once.
inline void gemm(const Tensor& out, const Tensor& a, const Tensor& b) {
  check_product(out, a, b);
  if (a.scalar_type() == ScalarType::Float || a.scalar_type() == ScalarType::Double) {
    STD_TORCH_CHECK(out.scalar_type() == a.scalar_type(), "a product's types do not match");
    return mm_out(out, a, b);
  }
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && (out.scalar_type() == a.scalar_type() ||
                                                         out.scalar_type() == ScalarType::Float),
                  "a product's types do not match");
  const Tensor wide = widened(out);
  mm_out(wide, widened(a), widened(b));
  copy_to(out, wide);
}

inline void add_gemm(const Tensor& out, const Tensor& a, const Tensor& b) {
  check_product(out, a, b);
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && out.scalar_type() == a.scalar_type(),
                  "a product's types do not match");
  if (size_of(dtype_of(a)) > 2) return addmm_out(out, a, b);
  const Tensor wide = widened(out);
  addmm_out(wide, widened(a), widened(b));
  copy_to(out, wide);
}

}  // namespace fusedpo
