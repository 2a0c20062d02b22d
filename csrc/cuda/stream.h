// What every function of csrc/cuda takes besides its data. No CUDA header is needed to call them.
//
// Unless it says otherwise a function enqueues work on `stream` of the current device and returns:
// it neither waits nor allocates, so it may be captured into a CUDA graph. It throws
// std::runtime_error with CUDA's message when the launch is refused. Pointers are device memory.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace fusedpo::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// Waits for `stream` and copies to host memory; not under capture.
void copy_to_host(void* to, const void* from, size_t bytes, Stream stream);

bool is_capturing(Stream stream);

// CUDA_VERSION of the runtime linked in, and of the newest runtime the driver serves; 0 without
// one.
int runtime_version();
int driver_version();

}  // namespace fusedpo::cuda
