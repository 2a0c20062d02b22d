// Memory for large tensors whose pages are still warm from the step before.
//
// Training allocates and frees the same few large tensors at every step. malloc gives those back to
// the kernel, which must then find and clear every page again: for a weight's gradient that takes
// as long as the matrix product that fills it. Returned pages stay mapped here, marked as free
// (MADV_FREE): the kernel takes them back whenever it is short of memory, so they are kept from
// nobody, and until then writing to them costs nothing. Resident memory counts them; LazyFree in
// /proc/<pid>/smaps_rollup says how many there are.
#pragma once

#include <cstddef>

namespace fusedpo {

// Whole huge pages (2 MiB) from `data` on; data is null where there are none.
struct Pages {
  void* data = nullptr;
  size_t bytes = 0;
};

// At least `bytes` bytes with arbitrary contents, `bytes` >= 1. Null where the platform has no
// MADV_FREE or the kernel refuses; the caller then allocates otherwise. Any thread; never waits.
Pages take_pages(size_t bytes);

// Ends the use of pages from take_pages. Any thread, also while the process ends; never waits.
void return_pages(Pages pages) noexcept;

}  // namespace fusedpo
