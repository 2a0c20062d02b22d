#include "cpu/page_pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <mutex>
#include <utility>

namespace fusedpo {

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSlots = 8;  // more than one step's large tensors: further ones are unmapped

// Whoever finds the lock taken does without: take maps fresh pages and return unmaps. So a child
// forked while another thread held the lock does not hang. Both members need no destructor, so
// tensors may die after static ones.
struct Pool {
  std::mutex lock;
  std::array<Pages, kSlots> slots;
};
constinit Pool pool;

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Sizes come in steps of an eighth, so that batches that differ a little take the same pages. Pages
// past the end are never touched, so they take no memory.
size_t size_class(size_t bytes) {
  return round_up(bytes, std::max(kHugePage, std::bit_floor(bytes) / 8));
}

Pages map_pages(size_t bytes) {
  // One huge page more, of which what lies outside the aligned part goes back.
  const size_t more = bytes + kHugePage;
  void* const mapped =
      mmap(nullptr, more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {};
  char* const first = static_cast<char*>(mapped);
  const size_t before =
      round_up(reinterpret_cast<uintptr_t>(first), kHugePage) - reinterpret_cast<uintptr_t>(first);
  if (before > 0) munmap(first, before);
  munmap(first + before + bytes, kHugePage - before);
  // It is advice: small pages do, too.
  madvise(first + before, bytes, MADV_HUGEPAGE);
  return {first + before, bytes};
}

// The smallest pages in the pool that hold `bytes` and not twice as much; null if there are none.
Pages take_from_pool(size_t bytes) {
  const std::unique_lock hold(pool.lock, std::try_to_lock);
  if (!hold) return {};
  Pages* best = nullptr;
  for (Pages& slot : pool.slots) {
    const bool fits = slot.bytes >= bytes && slot.bytes < 2 * bytes;
    if (fits && (best == nullptr || slot.bytes < best->bytes)) best = &slot;
  }
  return best == nullptr ? Pages{} : std::exchange(*best, {});
}

}  // namespace

Pages take_pages(size_t bytes) {
  if (bytes > SIZE_MAX / 4) return {};
  bytes = size_class(bytes);
  const Pages pages = take_from_pool(bytes);
  return pages.data != nullptr ? pages : map_pages(bytes);
}

void return_pages(Pages pages) noexcept {
  if (madvise(pages.data, pages.bytes, MADV_FREE) == 0) {
    const std::unique_lock hold(pool.lock, std::try_to_lock);
    if (hold) {
      // An empty slot is the smallest of all.
      const auto smallest =
          std::min_element(pool.slots.begin(), pool.slots.end(),
                           [](const Pages& a, const Pages& b) { return a.bytes < b.bytes; });
      if (smallest->bytes < pages.bytes) std::swap(*smallest, pages);
    }
  }
  if (pages.data != nullptr) munmap(pages.data, pages.bytes);
}

#else

Pages take_pages(size_t) { return {}; }
void return_pages(Pages) noexcept {}

#endif

}  // namespace fusedpo
