// Pages that come back: whose they are, that nobody shares them, and that the kernel may have them.
#include "cpu/page_pool.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace fusedpo {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

// Kilobytes of a field of /proc/self/smaps_rollup.
long rollup(const std::string& field) {
  std::ifstream file("/proc/self/smaps_rollup");
  for (std::string word; file >> word;) {
    long value = 0;
    if (word == field + ":" && file >> value) return value;
  }
  return -1;
}

// Asked of the system, not of the pool: a pool that keeps nothing must fail, not skip.
bool system_keeps_pages() {
#if defined(MADV_FREE)
  void* const page =
      mmap(nullptr, kMiB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const bool keeps = page != MAP_FAILED && madvise(page, kMiB, MADV_FREE) == 0;
  if (page != MAP_FAILED) munmap(page, kMiB);
  return keeps;
#else
  return false;
#endif
}

// Each test begins with nothing kept: eight pages that no test asks for push all others out.
class PagePool : public testing::Test {
 protected:
  void SetUp() override {
    if (!system_keeps_pages()) GTEST_SKIP() << "no MADV_FREE here, or memory is locked";
    Pages pages[8];
    for (Pages& each : pages) {
      each = take_pages(2048 * kMiB);
      ASSERT_NE(each.data, nullptr) << "no 2 GiB of address space";
    }
    for (const Pages& each : pages) return_pages(each);
  }
};

TEST_F(PagePool, GivesWholeHugePages) {
  for (const size_t bytes : {size_t{1}, 2 * kMiB, 2 * kMiB + 1, 75 * kMiB}) {
    const Pages pages = take_pages(bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(pages.data) % (2 * kMiB), 0u);
    EXPECT_EQ(pages.bytes % (2 * kMiB), 0u);
    EXPECT_GE(pages.bytes, bytes);
    EXPECT_LE(pages.bytes, bytes + bytes / 8 + 2 * kMiB);
    std::memset(pages.data, 1, pages.bytes);
    return_pages(pages);
  }
}

TEST_F(PagePool, HandsReturnedPagesOutAgain) {
  const Pages first = take_pages(40 * kMiB);
  std::memset(first.data, 1, first.bytes);
  return_pages(first);
  const Pages smaller = take_pages(30 * kMiB);  // more than half: the same pages
  EXPECT_EQ(smaller.data, first.data);
  EXPECT_EQ(smaller.bytes, first.bytes);
  const Pages other = take_pages(40 * kMiB);  // while those are in use
  EXPECT_NE(other.data, first.data);
  return_pages(smaller);
  return_pages(other);
}

TEST_F(PagePool, KeepsLargePagesForLargeTensors) {
  const Pages large = take_pages(90 * kMiB);
  return_pages(large);
  const Pages small = take_pages(20 * kMiB);
  EXPECT_NE(small.data, large.data);
  const Pages again = take_pages(90 * kMiB);
  EXPECT_EQ(again.data, large.data);
  return_pages(small);
  return_pages(again);
}

TEST_F(PagePool, ReturnedPagesAreForTheSystemToTake) {
  if (rollup("LazyFree") < 0) GTEST_SKIP() << "smaps_rollup does not say what is free";
  const Pages pages = take_pages(64 * kMiB);
  std::memset(pages.data, 1, pages.bytes);
  const long before = rollup("LazyFree");
  return_pages(pages);
  // Linux counts pages in batches, so a few may be missing.
  EXPECT_GE(rollup("LazyFree") - before, 63 * 1024);
}

TEST_F(PagePool, KeepsTheEightThatWereReturnedLast) {
  std::vector<Pages> all;
  for (size_t i = 0; i < 12; ++i) all.push_back(take_pages((4 << i % 3) * 2 * kMiB));
  for (const Pages& pages : all) return_pages(pages);
  std::multiset<size_t> expected;
  for (size_t i = 4; i < 12; ++i) expected.insert(all[i].bytes);
  std::set<void*> last;
  for (size_t i = 4; i < 12; ++i) last.insert(all[i].data);
  std::vector<Pages> again;
  for (const size_t bytes : expected) again.push_back(take_pages(bytes));
  for (const Pages& pages : again) {
    EXPECT_EQ(last.erase(pages.data), 1u) << "pages of " << pages.bytes / kMiB << " MiB are new";
    return_pages(pages);
  }
}

TEST_F(PagePool, RefusesWhatCannotBe) {
  EXPECT_EQ(take_pages(SIZE_MAX).data, nullptr);
  EXPECT_EQ(take_pages(size_t{1} << 60).data, nullptr);
}

TEST_F(PagePool, ThreadsNeverShareThem) {
  std::vector<std::thread> threads;
  std::atomic<int> taken_again{0};
  for (unsigned char id = 1; id <= 6; ++id) {
    threads.emplace_back([id, &taken_again] {
      std::set<void*> known;
      for (int round = 0; round < 200; ++round) {
        const Pages pages = take_pages((2 + static_cast<size_t>(round + id) % 5) * kMiB);
        auto* bytes = static_cast<unsigned char*>(pages.data);
        ASSERT_NE(bytes, nullptr);
        for (size_t i = 0; i < pages.bytes; i += 4096) bytes[i] = id;
        for (size_t i = 0; i < pages.bytes; i += 4096) ASSERT_EQ(bytes[i], id);
        taken_again += !known.insert(bytes).second;
        return_pages(pages);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(taken_again, 0);
}

TEST_F(PagePool, AForkedChildHasItsOwn) {
  const Pages pages = take_pages(8 * kMiB);
  std::memset(pages.data, 7, pages.bytes);
  const pid_t child = fork();
  if (child == 0) {
    std::memset(pages.data, 8, pages.bytes);
    return_pages(pages);
    const Pages again = take_pages(8 * kMiB);
    std::memset(again.data, 9, again.bytes);
    _exit(again.data == pages.data ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(*static_cast<unsigned char*>(pages.data), 7);
  return_pages(pages);
}

// Kept pages are address space: where that is limited they must not take it from others.
TEST_F(PagePool, GivesItsAddressSpaceUpWhenThatRunsOut) {
  const pid_t child = fork();
  if (child == 0) {
    const Pages kept = take_pages(2000 * kMiB);
    if (kept.data == nullptr) _exit(1);
    return_pages(kept);
    std::ifstream file("/proc/self/statm");
    size_t in_use = 0;
    file >> in_use;
    const rlim_t limit = in_use * static_cast<size_t>(sysconf(_SC_PAGESIZE)) + 64 * kMiB;
    const rlimit both{limit, limit};
    if (setrlimit(RLIMIT_AS, &both) != 0) _exit(2);
    _exit(take_pages(500 * kMiB).data != nullptr ? 0 : 3);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace fusedpo
