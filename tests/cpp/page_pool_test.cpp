// Pages that come back: whose they are, that nobody shares them, and that the kernel may have them.
#include "cpu/page_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

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

class PagePool : public testing::Test {
 protected:
  void SetUp() override {
    const Pages pages = take_pages(1);
    if (pages.data == nullptr) GTEST_SKIP() << "no MADV_FREE here";
    return_pages(pages);
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

TEST_F(PagePool, ReturnedPagesAreTheKernels) {
  const Pages pages = take_pages(64 * kMiB);
  std::memset(pages.data, 1, pages.bytes);
  const long before = rollup("LazyFree");
  return_pages(pages);
  EXPECT_GE(rollup("LazyFree") - before, static_cast<long>(pages.bytes / 1024));
}

TEST_F(PagePool, UnmapsTheSmallestWhenFull) {
  std::vector<Pages> all;
  for (size_t i = 0; i < 40; ++i) all.push_back(take_pages((3 + i) * kMiB));
  for (const Pages& pages : all) {
    std::memset(pages.data, 1, pages.bytes);
    return_pages(pages);
  }
  // Eight are left, of the largest; the others' memory is gone.
  EXPECT_LE(rollup("LazyFree") / 1024, 8 * 48L);
  const Pages again = take_pages(42 * kMiB);
  std::set<void*> known;
  for (const Pages& pages : all) known.insert(pages.data);
  EXPECT_TRUE(known.contains(again.data));
  return_pages(again);
}

TEST_F(PagePool, RefusesWhatCannotBe) {
  EXPECT_EQ(take_pages(SIZE_MAX).data, nullptr);
  EXPECT_EQ(take_pages(size_t{1} << 60).data, nullptr);
}

TEST_F(PagePool, ThreadsNeverShareThem) {
  std::vector<std::thread> threads;
  for (unsigned char id = 1; id <= 6; ++id) {
    threads.emplace_back([id] {
      for (int round = 0; round < 200; ++round) {
        const Pages pages = take_pages((2 + static_cast<size_t>(round + id) % 5) * kMiB);
        auto* bytes = static_cast<unsigned char*>(pages.data);
        for (size_t i = 0; i < pages.bytes; i += 4096) bytes[i] = id;
        for (size_t i = 0; i < pages.bytes; i += 4096) ASSERT_EQ(bytes[i], id);
        return_pages(pages);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
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

}  // namespace
}  // namespace fusedpo
