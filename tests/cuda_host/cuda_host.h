// What a test can ask of the CUDA emulation.
#pragma once

#include <cstdint>
#include <vector>

#include "engine.h"

namespace cuda_host {

// 0, as at the start: blocks and threads run in their natural order and shared memory keeps what
// was in it. Any other seed: both orders are random, and every block finds garbage in its shared
// memory. Results must not depend on it.
void set_seed(uint64_t seed);

// What a stream under capture says of itself; waiting for it is then an error, as in CUDA.
void set_capturing(cudaStream_t stream, bool capturing);

// Whether this program is linked with the memory checker (memory_check.cpp).
bool memory_is_checked();

struct Launch {
  dim3 grid, block;  // block.x = 0: an asynchronous copy or fill
  cudaStream_t stream;
};

// Called by what launches.
void note(const Launch& launch);

// Notes what the process enqueues while it lives. One at a time.
class LaunchLog {
 public:
  LaunchLog();
  ~LaunchLog();
  LaunchLog(const LaunchLog&) = delete;
  LaunchLog& operator=(const LaunchLog&) = delete;

  const std::vector<Launch>& launches() const { return launches_; }

 private:
  std::vector<Launch> launches_;
};

}  // namespace cuda_host
