// Large CPU tensors whose pages arrive two megabytes at a time.
//
// torch takes memory from malloc. What is smaller than 32 MiB, such as every block of logits here,
// glibc hands out again without asking the kernel. Larger memory is fresh at every call, and the
// kernel's 4 KiB faults take three times as long as the arithmetic that fills it. A cache of our
// own would keep hundreds of megabytes from everybody else, and could not hold what a caller keeps;
// asking for huge pages costs nothing, holds nothing, and leaves a fifth of the time.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ops/stable.h"

namespace fusedpo {

constexpr int64_t kFreshBytes = int64_t{32} << 20;  // glibc's largest mmap threshold
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// Like empty_as, for what may be large. Where the kernel has no huge pages it is empty_as.
inline Tensor empty_large(const Tensor& like, std::vector<int64_t> sizes, DType type) {
  Tensor t = empty_as(like, std::move(sizes), type);
#if defined(MADV_HUGEPAGE)
  const int64_t bytes = t.numel() * size_of(type);
  if (bytes >= kFreshBytes) {
    const uintptr_t data = reinterpret_cast<uintptr_t>(t.data_ptr());
    const uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (data + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
    // It is advice: a kernel that refuses leaves everything as it was.
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return t;
}

inline Tensor zeros_large(const Tensor& like, std::vector<int64_t> sizes, DType type) {
  Tensor t = empty_large(like, std::move(sizes), type);
  torch::stable::zero_(t);
  return t;
}

}  // namespace fusedpo
