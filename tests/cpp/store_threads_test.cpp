// Readers, a writer and merges at the same time, each in threads of their own: every reader sees
// every record that was confirmed before it looked, and never a wrong one. `make tsan` runs this
// under the thread sanitizer.
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <random>
#include <thread>

#include "store_cases.h"

namespace fusedpo {
namespace {

TEST(StoreThreads, ReadersSeeEverythingConfirmedWhileOthersWriteAndMerge) {
  std::string pattern = testing::TempDir() + "fusedpo-threads-XXXXXX";
  const std::string directory = ::mkdtemp(pattern.data());
  Store shared(FileSystem::posix(), directory, test_identity());
  constexpr std::uint64_t kRecords = 2000, kBatch = 50;
  std::atomic<std::uint64_t> confirmed = 0;
  std::atomic<bool> done = false;
  std::atomic<int> wrong = 0, lost = 0;

  std::thread writing([&] {
    for (std::uint64_t at = 0; at < kRecords;) {
      const auto writer = shared.writer("w");  // a log of its own every four batches
      for (int batch = 0; batch < 4 && at < kRecords; ++batch, at += kBatch) {
        append(*writer, range(at, at + kBatch), at % 100 == 0);
        writer->sync();
        confirmed = at + kBatch;
      }
      writer->close();
    }
    done = true;
  });
  std::thread merging([&] {
    while (!done) merge_store(FileSystem::posix(), directory, test_identity(), {});
  });
  const auto read = [&](Store& store, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    while (!done) {
      const std::uint64_t promised = confirmed;
      store.refresh();
      const auto view = store.view();
      for (int n = 0; n < 100; ++n) {
        const std::uint64_t i = random() % kRecords;
        const Seen seen = look(*view, i);
        if (seen == Seen::kWrong) ++wrong;
        if (seen == Seen::kAbsent && i < promised) ++lost;
      }
    }
  };
  std::thread reading_shared([&] { read(shared, 1); });
  std::thread reading_shared_too([&] { read(shared, 2); });
  std::thread reading_own([&] {
    Store own(FileSystem::posix(), directory, test_identity());
    read(own, 3);
  });
  for (std::thread* t : {&writing, &merging, &reading_shared, &reading_shared_too, &reading_own})
    t->join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(lost, 0);
  MergeOptions options;
  EXPECT_EQ(shared.merge(options).records, kRecords);
  EXPECT_EQ(shared.view()->logs().size(), 0u);
  EXPECT_EQ(shared.view()->snapshots().size(), 1u);
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace fusedpo
