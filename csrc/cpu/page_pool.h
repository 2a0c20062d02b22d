// Memory for large tensors whose pages are still warm from the step before.
//
// Training allocates and frees the same few large tensors at every step. malloc gives those back to
// the operating system, which must then find and clear every page again: for a weight's gradient
// that takes as long as the matrix product that fills it. Pages returned here stay mapped, marked
// as free (Linux: MADV_FREE). The system takes them whenever it or the process's control group is
// short of memory, and until then they can be written to at no cost. They count as resident (RSS;
// LazyFree in /proc/<pid>/smaps_rollup says how much of it) and as address space.
#pragma once

#include <cstddef>

namespace fusedpo {

// Whole huge pages (2 MiB) from `data` on; data is null where there are none.
struct Pages {
  void* data = nullptr;
  size_t bytes = 0;
};

// At least `bytes` bytes with arbitrary contents, `bytes` >= 1. Null where the platform has no
// MADV_FREE or memory ran out; the caller then allocates otherwise. From any thread, without
// waiting for another.
Pages take_pages(size_t bytes);

// Ends the use of pages from take_pages. From any thread, also while the process ends. At most 8
// tensors' pages are kept: those that were returned last.
void return_pages(Pages pages) noexcept;

// Asks for huge pages within [data, data + bytes), which must be mapped. Only advice.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace fusedpo
