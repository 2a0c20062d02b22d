// The one place where the CUDA operators meet the device: its stream, its matrix products, and how
// much of it a chunk may take. tests/cuda_host/ops/cuda_device.h is its twin, which runs the same
// operators on the CPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <array>

#include "cuda/stream.h"
#include "ops/stable.h"

#define FUSEDPO_CUDA_KEY CUDA  // the dispatch key the operators are registered for

namespace fusedpo {

// Logits of one chunk of rows. 640 MiB are 2048 rows of a vocabulary of 152k in bf16, where a GEMM
// has long reached its full speed. Work that is repeated for every chunk over the whole [V, H] (a
// weight that is cast, a sum that is read and written) gets larger chunks.
constexpr int64_t kChunkBytes = int64_t{640} << 20;
constexpr int64_t kCostlyChunkBytes = int64_t{896} << 20;
constexpr int64_t kSmallestChunk = 1024;  // rows below which a GEMM loses speed
constexpr int64_t kChunkStep = 128;       // rows are a multiple of it: no GEMM ends in a thin tile

// Makes a tensor's device the current one while it lives.
class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& t) : guard_(t.get_device_index()) {
    void* current = nullptr;
    FUSEDPO_TORCH_CALL(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cuda::Stream>(current);
    capturing = cuda::is_capturing(stream);
  }

  cuda::Stream stream;
  bool capturing;  // into a CUDA graph: nothing may wait for the device

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(out.size(0) == a.size(0) && out.size(1) == b.size(1) && a.size(1) == b.size(0),
                  "a product's shapes do not match");  // mm.out would resize out away
}

// out = a @ b with a and b of one type, out of theirs or, for half types, fp32: summed in fp32 at
// least and rounded once. Rows of out may be strided. Not autocast.
inline void gemm(const Tensor& out, const Tensor& a, const Tensor& b) {
  check_product(out, a, b);
  using torch::stable::detail::from;
  if (out.scalar_type() == a.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    FUSEDPO_TORCH_CALL(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // owned: it would leak
    return;
  }
  std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
  FUSEDPO_TORCH_CALL(
      torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// out += a @ b, all of one type.
inline void add_gemm(const Tensor& out, const Tensor& a, const Tensor& b) {
  check_product(out, a, b);
  FUSEDPO_TORCH_CALL(aoti_torch_cuda_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

}  // namespace fusedpo
