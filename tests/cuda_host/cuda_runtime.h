// Stands in for CUDA's header of this name when the host compiler builds csrc/cuda/*.cu. Declares
// what those files use; anything else fails to compile and is to be added here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "engine.h"

#define CUDART_VERSION 13000
#define CUDA_VERSION CUDART_VERSION

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// Of one CPU thread, hence of the one block that it runs; the engine fills it with garbage before
// every block. `extern __shared__` does not compile.
#define __shared__ static thread_local

namespace cuda_host {

enum class Of { kThread, kBlock, kBlockSize, kGridSize };

// Reads a coordinate of the running thread; an object, so that other things may be called gridDim.
template <Of kOf, int kAxis>
struct Coordinate {
  FUSEDPO_UNCHECKED operator unsigned() const {
    const Block& block = *current->block;
    const dim3& at = kOf == Of::kThread      ? current->index
                     : kOf == Of::kBlock     ? block.index
                     : kOf == Of::kBlockSize ? block.size
                                             : block.grid;
    return kAxis == 0 ? at.x : kAxis == 1 ? at.y : at.z;
  }
};

template <Of kOf>
struct Coordinates {
  Coordinate<kOf, 0> x;
  Coordinate<kOf, 1> y;
  Coordinate<kOf, 2> z;
};

}  // namespace cuda_host

inline constexpr cuda_host::Coordinates<cuda_host::Of::kThread> threadIdx{};
inline constexpr cuda_host::Coordinates<cuda_host::Of::kBlock> blockIdx{};
inline constexpr cuda_host::Coordinates<cuda_host::Of::kBlockSize> blockDim{};
inline constexpr cuda_host::Coordinates<cuda_host::Of::kGridSize> gridDim{};
constexpr int warpSize = cuda_host::kWarp;

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

// ---- errors, streams, copies ----------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

// ---- launches -------------------------------------------------------------------

namespace cuda_host {

cudaError_t remember(cudaError_t error);  // for cudaGetLastError

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                   Args&&... args) {
  static_assert((std::is_trivially_copyable_v<std::decay_t<Params>> && ...),
                "CUDA copies a kernel's parameters byte by byte");
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> params;
  } call{kernel, std::tuple<std::decay_t<Params>...>(std::forward<Args>(args)...)};
  static_assert(sizeof call.params <= 4096, "CUDA takes 4096 bytes of parameters");
  const auto body = [](void* data) {
    const Call& c = *static_cast<Call*>(data);
    std::apply(c.kernel, c.params);
  };
  return remember(run(grid, block, stream, body, &call, sizeof call)
                      ? cudaSuccess
                      : cudaErrorInvalidConfiguration);
}

}  // namespace cuda_host

#include "device_functions.h"
