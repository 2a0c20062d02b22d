#include "cpu/page_pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <utility>

namespace fusedpo {

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// Neither member has a destructor: tensors may die after static objects.
struct Pool {
  std::atomic_flag in_use;
  std::array<Pages, 8> kept;  // the one returned last first; null ones at the end
};
constinit Pool pool;

// The pool, for one thread at a time. Whoever finds it in use does without: take_pages maps fresh
// pages, return_pages unmaps. So a child forked while another thread used it does not hang.
class Claim {
 public:
  Claim() : mine_(!pool.in_use.test_and_set(std::memory_order_acquire)) {}
  ~Claim() {
    if (mine_) pool.in_use.clear(std::memory_order_release);
  }
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;
  explicit operator bool() const { return mine_; }

 private:
  const bool mine_;
};

// Set once MADV_FREE has failed, as it does for locked memory and on old kernels: nothing can be
// kept then, and malloc serves better.
constinit std::atomic<bool> useless{false};

constexpr size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Sizes come in steps of an eighth, so that batches that differ a little take the same pages.
size_t size_class(size_t bytes) {
  return round_up(bytes, std::max(kHugePage, std::bit_floor(bytes) / 8));
}

void unmap(const Pages& pages) {
  if (pages.data != nullptr) munmap(pages.data, pages.bytes);
}

Pages map_pages(size_t bytes) {
  // One huge page more, of which what lies outside the aligned part goes back.
  void* const mapped =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {};
  const uintptr_t at = reinterpret_cast<uintptr_t>(mapped);
  const size_t before = round_up(at, kHugePage) - at;
  char* const data = static_cast<char*>(mapped) + before;
  if (before > 0) munmap(mapped, before);
  munmap(data + bytes, kHugePage - before);
  advise_huge_pages(data, bytes);
  return {data, bytes};
}

// The smallest kept pages that hold `bytes` and not twice as much; null if there are none.
Pages take_kept(size_t bytes) {
  const Claim claim;
  if (!claim) return {};
  Pages* best = nullptr;
  for (Pages& kept : pool.kept) {
    const bool fits = kept.bytes >= bytes && kept.bytes < 2 * bytes;
    if (fits && (best == nullptr || kept.bytes < best->bytes)) best = &kept;
  }
  if (best == nullptr) return {};
  const Pages pages = std::exchange(*best, {});
  std::rotate(best, best + 1, pool.kept.end());
  return pages;
}

// Puts `newest` first; the pages that fall off the other end.
Pages keep(Pages newest) {
  const Claim claim;
  if (!claim) return newest;
  for (Pages& kept : pool.kept) std::swap(kept, newest);
  return newest;
}

void unmap_kept() {
  const Claim claim;
  if (!claim) return;
  for (Pages& kept : pool.kept) unmap(std::exchange(kept, {}));
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = round_up(at, kHugePage), end = (at + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(static_cast<char*>(data) + (begin - at), end - begin, MADV_HUGEPAGE);
}

Pages take_pages(size_t bytes) {
  if (useless || bytes > SIZE_MAX / 4) return {};
  bytes = size_class(bytes);
  Pages pages = take_kept(bytes);
  if (pages.data == nullptr) pages = map_pages(bytes);
  if (pages.data == nullptr) {
    // Kept pages count as address space, which may be limited.
    unmap_kept();
    pages = map_pages(bytes);
  }
  return pages;
}

void return_pages(Pages pages) noexcept {
  if (madvise(pages.data, pages.bytes, MADV_FREE) == 0) {
    pages = keep(pages);
  } else {
    useless = true;
  }
  unmap(pages);
}

#else

Pages take_pages(size_t) { return {}; }
void return_pages(Pages) noexcept {}
void advise_huge_pages(void*, size_t) {}

#endif

}  // namespace fusedpo
