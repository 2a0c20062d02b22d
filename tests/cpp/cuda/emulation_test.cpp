// The CUDA emulation itself: what it computes, in which order, and that it refuses what is wrong.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda_host.h"
#include "device_array.h"
#include "toy_kernels.h"

namespace {

using fusedpo::DeviceArray;

class Emulation : public testing::Test {
 protected:
  void TearDown() override { cuda_host::set_seed(0); }
};
using EmulationDeath = Emulation;

TEST_F(Emulation, ABlockSumsByShufflesAndSharedMemory) {
  for (uint64_t seed : {0, 1, 2}) {
    cuda_host::set_seed(seed);
    std::vector<float> x(4 * 96);
    std::iota(x.begin(), x.end(), 0.0f);
    const DeviceArray<float> in(x);
    DeviceArray<float> out(4);
    toy::block_sum(in.data(), out.data(), 4, 96, nullptr);
    for (size_t b = 0; b < 4; ++b) {
      EXPECT_EQ(out.host()[b], std::accumulate(&x[b * 96], &x[b * 96] + 96, 0.0f));
    }
  }
}

TEST_F(Emulation, ShufflesKeepTheirValueAtTheEndsOfASegment) {
  DeviceArray<int> out(160);
  toy::shuffles(out.data());
  const std::vector<int> got = out.host();
  for (int lane = 0; lane < 32; ++lane) {
    const auto at = [&](int row) { return got[static_cast<size_t>(32 * row + lane)]; };
    EXPECT_EQ(at(0), 3);
    EXPECT_EQ(at(1), lane < 3 ? lane : lane - 3);
    EXPECT_EQ(at(2), lane > 28 ? lane : lane + 3);
    // An earlier segment of 8 can be read, a later one cannot.
    EXPECT_EQ(at(3), (lane & 8) == 0 ? lane : lane ^ 12);
    EXPECT_EQ(at(4), lane < 16 ? 2 : 18);
  }
}

TEST_F(Emulation, VotesCountTheirLanes) {
  DeviceArray<int> out(5);
  toy::votes(out.data());
  EXPECT_EQ(out.host(), (std::vector<int>{static_cast<int>(0xaaaaaaaau), 1, 0, 496, 2}));
}

TEST_F(Emulation, OrderIsNaturalWithoutASeedAndRandomWithOne) {
  if (cuda_host::memory_is_checked()) GTEST_SKIP() << "the kernel races on purpose";
  std::set<std::vector<int>> orders;
  for (uint64_t seed : {0, 1, 2, 1}) {
    cuda_host::set_seed(seed);
    std::vector<int> next(1), order(12);
    toy::note_order(next.data(), order.data(), 4, 3);
    if (seed == 0) {
      EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
    }
    // Blocks run one after another in any order.
    for (size_t i = 0; i < 12; ++i) EXPECT_EQ(order[i] / 3, order[i / 3 * 3] / 3);
    orders.insert(order);
  }
  EXPECT_EQ(orders.size(), 3u) << "seed 1 must repeat itself";
}

TEST_F(Emulation, EverySeedOverwritesSharedMemoryBetweenBlocks) {
  if (cuda_host::memory_is_checked()) GTEST_SKIP() << "reading it is an error in this build";
  cuda_host::set_seed(3);
  DeviceArray<uint32_t> out(64 * 8);
  toy::read_shared(out.data(), 8, true);
  toy::read_shared(out.data(), 8, false);
  std::set<uint32_t> seen;
  for (uint32_t value : out.host()) seen.insert(value);
  EXPECT_EQ(seen.count(7), 0u);
  EXPECT_GT(seen.size(), 2u);
}

TEST_F(Emulation, SeveralCpuThreadsLaunchAtOnce) {
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([t, &wrong] {
      const std::vector<float> x(256, static_cast<float>(t));
      const DeviceArray<float> in(x);
      for (int round = 0; round < 50; ++round) {
        DeviceArray<float> out(1);
        toy::block_sum(in.data(), out.data(), 1, 256, nullptr);
        wrong[t] += out.host()[0] != 256.0f * static_cast<float>(t);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4));
}

TEST_F(Emulation, LaunchesAreNotedAndBadOnesRefused) {
  const auto stream = reinterpret_cast<CUstream_st*>(64);
  const DeviceArray<float> in(std::vector<float>(64, 1.0f));
  DeviceArray<float> out(2);
  const cuda_host::LaunchLog log;
  toy::block_sum(in.data(), out.data(), 2, 32, stream);
  ASSERT_EQ(log.launches().size(), 1u);
  EXPECT_EQ(log.launches()[0].grid.x, 2u);
  EXPECT_EQ(log.launches()[0].stream, stream);
  EXPECT_EQ(toy::launch_shape(1, 1024), 0);
  EXPECT_EQ(toy::launch_shape(0, 32), 9);
  EXPECT_EQ(toy::launch_shape(1, 1025), 9);
}

TEST_F(Emulation, RightUsesPass) {
  for (uint64_t seed : {0, 1, 2}) {
    cuda_host::set_seed(seed);
    toy::barrier_in_a_branch(true);
    toy::different_barriers(true);
    toy::barrier_after_an_exit(true);
    toy::shuffle_without_a_lane(true);
    toy::shuffle_from_outside_the_mask(true);
    toy::shuffle_without_the_caller(true);
    toy::shuffle_in_half_a_block_of_16(true);
  }
}

TEST_F(EmulationDeath, DivergenceAborts) {
  for (uint64_t seed : {0, 1, 2}) {
    cuda_host::set_seed(seed);
    EXPECT_DEATH(toy::barrier_in_a_branch(false), "__syncthreads, but");
    EXPECT_DEATH(toy::different_barriers(false), "different __syncthreads");
    EXPECT_DEATH(toy::barrier_after_an_exit(false), "has ended");
    EXPECT_DEATH(toy::shuffle_without_a_lane(false), "has ended");
    EXPECT_DEATH(toy::shuffle_from_outside_the_mask(false), "reads from lane .* not in mask");
    EXPECT_DEATH(toy::shuffle_without_the_caller(false), "which it is not in");
    EXPECT_DEATH(toy::shuffle_in_half_a_block_of_16(false), "which the block does not have");
  }
}

TEST_F(EmulationDeath, MisalignedVectorAccessAborts) {
  alignas(16) const char bytes[64] = {};
  EXPECT_DEATH(toy::misaligned_load(bytes + 4), "misaligned");
}

TEST_F(Emulation, OrderedUsesOfSharedMemoryPass) {
  for (uint64_t seed : {0, 1, 2}) {
    cuda_host::set_seed(seed);
    std::vector<int> x(64);
    std::iota(x.begin(), x.end(), 0);
    const DeviceArray<int> in(x);
    DeviceArray<int> out(64), twice(128);
    toy::reverse(in.data(), out.data(), 64, true);
    EXPECT_EQ(out.host()[0], 63);
    toy::swap_neighbours(in.data(), out.data(), true);
    EXPECT_EQ(out.host()[0], 1);
    toy::reuse_shared(in.data(), twice.data(), true);
    EXPECT_EQ(twice.host()[127], 1);
  }
}

// Without the checker a missing barrier shows in most orders; with it, in every one.
TEST_F(EmulationDeath, AMissingBarrierShows) {
  const DeviceArray<int> in(std::vector<int>(64, 1));
  DeviceArray<int> out(64), twice(128);
  if (cuda_host::memory_is_checked()) {
    EXPECT_DEATH(toy::reverse(in.data(), out.data(), 64, false), "no thread of this block|no barr");
    EXPECT_DEATH(toy::swap_neighbours(in.data(), out.data(), false), "no barrier since");
    EXPECT_DEATH(toy::reuse_shared(in.data(), twice.data(), false), "no barrier since");
    return;
  }
  int wrong = 0;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    cuda_host::set_seed(seed);
    toy::reverse(in.data(), out.data(), 64, false);
    wrong += out.host() != std::vector<int>(64, 1);
  }
  EXPECT_EQ(wrong, 8);
}

TEST_F(EmulationDeath, BlocksMustNotMeetInMemory) {
  DeviceArray<int> out(4);
  toy::write_one_place(out.data(), true);
  toy::read_the_next(out.data(), false);
  if (!cuda_host::memory_is_checked()) GTEST_SKIP() << "found by the build with the memory checker";
  EXPECT_DEATH(toy::write_one_place(out.data(), false), "another block");
  EXPECT_DEATH(toy::read_the_next(out.data(), true), "another block");
}

TEST_F(EmulationDeath, MemoryThatWasNotGivenIsNotTouched) {
  const DeviceArray<int> in(std::vector<int>(8, 1), 2);
  DeviceArray<int> out(8);
  toy::copy(in.data(), out.data(), 8);
  EXPECT_EQ(out.host(), std::vector<int>(8, 1));
  EXPECT_DEATH(toy::copy(in.data(), out.data(), 9), "past the end|outside|AddressSanitizer");
  EXPECT_DEATH(toy::copy(in.data() - 1, out.data(), 8), "outside|AddressSanitizer");
  if (!cuda_host::memory_is_checked()) GTEST_SKIP() << "the rest is found by the memory checker";
  DeviceArray<int> unwritten(8);
  EXPECT_DEATH(toy::copy(unwritten.data(), out.data(), 8), "nobody has written");
  out.forbid(3, 4);
  EXPECT_DEATH(toy::copy(in.data(), out.data(), 8), "between two rows");
}

}  // namespace
