// Runs a CUDA grid on the calling CPU thread. Blocks run one after another; the threads of a block
// are fibers that switch at barriers, shuffles and votes, and nowhere else. Kernels see this
// through cuda_runtime.h, tests through cuda_host.h.
//
// What CUDA leaves undefined ends the process with a message: a barrier that not every thread of
// the block reaches, a shuffle or vote that not every lane of its mask reaches at the same line, a
// lane that reads from a lane outside the mask, a misaligned vector access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "vector_types.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;

// What looks at the engine's own memory on behalf of a kernel: not for the memory checker.
#ifdef __SANITIZE_THREAD__
#define FUSEDPO_UNCHECKED __attribute__((no_sanitize("thread")))
#else
#define FUSEDPO_UNCHECKED
#endif

namespace cuda_host {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxBlock = 1024;

// Where in the kernel's source something was called.
struct Site {
  const char* file;
  int line;
};

struct Block {
  dim3 index;
  dim3 size, grid;
};

// A CUDA thread as its kernel sees it.
struct Thread {
  dim3 index;
  unsigned number, lane;  // within the block, within the warp
  const Block* block;
};

// The CUDA thread that this CPU thread is running; null outside kernels.
extern __thread Thread* current;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- what threads of a block do together --------------------------------------

enum class Vote { kCount, kAnd, kOr };

// Waits for every thread of the block; `predicate` is combined over them.
int barrier(Vote vote, int predicate, Site site);

enum class WarpOp { kSync, kShuffle, kAll, kAny, kBallot, kAdd, kMin, kMax, kAnd, kOr, kXor };

// Waits for every lane of `mask`. A shuffle returns `value` of lane `source`, the others combine.
uint64_t warp(WarpOp op, uint32_t mask, uint64_t value, unsigned source, Site site);

// ---- launches -------------------------------------------------------------------

// Runs `body` once per CUDA thread and returns true; false, and nothing is run, for a grid or a
// block that CUDA refuses too. [args, args + bytes) holds what the kernel is given by value.
bool run(dim3 grid, dim3 block, cudaStream_t stream, void (*body)(void*), void* args, size_t bytes);

template <typename T>
const T* aligned(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % alignof(T) != 0) {
    fail("an access of %zu bytes at %p is misaligned", sizeof(T), static_cast<const void*>(at));
  }
  return at;
}

}  // namespace cuda_host
