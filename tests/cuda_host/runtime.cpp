// The part of CUDA's runtime that csrc/cuda calls. Streams run in order and at once: work is done
// when the call that enqueues it returns.
#include "cuda_runtime.h"

#include <atomic>
#include <mutex>
#include <set>

#include "cuda_host.h"
#include "memory.h"

namespace cuda_host {
namespace {

std::mutex mutex;  // guards the next two
std::set<cudaStream_t> capturing;
std::vector<Launch>* log = nullptr;

std::atomic<cudaError_t> last_error{cudaSuccess};

bool is_capturing(cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  return capturing.count(stream) != 0;
}

}  // namespace

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

void set_capturing(cudaStream_t stream, bool on) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (on) {
    capturing.insert(stream);
  } else {
    capturing.erase(stream);
  }
}

void note(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (log != nullptr) log->push_back(launch);
}

LaunchLog::LaunchLog() {
  const std::lock_guard<std::mutex> lock(mutex);
  log = &launches_;
}

LaunchLog::~LaunchLog() {
  const std::lock_guard<std::mutex> lock(mutex);
  log = nullptr;
}

}  // namespace cuda_host

using cuda_host::remember;

cudaError_t cudaGetLastError() { return cuda_host::last_error.exchange(cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return cuda_host::last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
  }
  return "unrecognized error code";
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  // Into pageable memory a copy waits for the stream.
  if (cuda_host::is_capturing(stream)) return remember(cudaErrorStreamCaptureUnsupported);
  cuda_host::note({1, 0, stream});
  if (bytes != 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return cuda_host::is_capturing(stream) ? remember(cudaErrorStreamCaptureUnsupported)
                                         : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status =
      cuda_host::is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return remember(cudaErrorInvalidValue);
  *value = 3;  // few, so that loops over the grid go round more than once
  return cudaSuccess;
}
