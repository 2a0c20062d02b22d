#include "engine.h"

#include <link.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "block_runner.h"
#include "cuda_host.h"

namespace cuda_host {

// __shared__ variables are thread_local (see cuda_runtime.h), and so is this, the only one of the
// program that a fill with garbage must spare.
__thread Thread* current = nullptr;

namespace {

std::atomic<uint64_t> seed_of_process{0};
std::atomic<uint64_t> launch_of_seed{0};
std::atomic<uint64_t> clock_of_process{1};

// The thread_local variables of the module this file is linked into, for the calling CPU thread.
void find_shared(LaunchState& s) {
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        const char* begin = static_cast<const char*>(info->dlpi_tls_data);
        for (int i = 0; begin != nullptr && i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const char* end = begin + segment.p_memsz;
          const char* mine = reinterpret_cast<const char*>(&current);
          if (segment.p_type != PT_TLS || mine < begin || mine >= end) continue;
          static_cast<LaunchState*>(data)->shared = begin;
          static_cast<LaunchState*>(data)->shared_end = end;
          return 1;
        }
        return 0;
      },
      &s);
  if (s.shared == nullptr) fail("cannot find where shared memory lies");
}

void fill_with_garbage(const LaunchState& s, Random& random) {
  // All ones: a NaN of every type, -1, and no bool at all. Or anything.
  const uint64_t word = random.below(2) == 0 ? ~uint64_t{0} : random();
  const auto fill = [&](const char* from, const char* to) {
    char* at = const_cast<char*>(from);
    for (; to - at >= 8; at += 8) std::memcpy(at, &word, 8);
    std::memcpy(at, &word, static_cast<size_t>(to - at));
  };
  const char* spared = reinterpret_cast<const char*>(&current);
  fill(s.shared, spared);
  fill(spared + sizeof current, s.shared_end);
}

// Making 1024 stacks takes a millisecond, so they are kept.
class StackPool {
 public:
  std::unique_ptr<Stacks> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Stacks>();
    auto stacks = std::move(free_.back());
    free_.pop_back();
    return stacks;
  }
  void give_back(std::unique_ptr<Stacks> stacks) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(stacks));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Stacks>> free_;
};

StackPool& stack_pool() {
  static StackPool pool;
  return pool;
}

}  // namespace

void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fputs("cuda_host: ", stderr);
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  std::fputc('\n', stderr);
  std::abort();
}

int barrier(Vote vote, int predicate, Site site) {
  if (current == nullptr) fail("%s:%d: __syncthreads outside a kernel", site.file, site.line);
  return static_cast<Worker*>(current)->runner->barrier(vote, predicate, site);
}

uint64_t warp(WarpOp op, uint32_t mask, uint64_t value, unsigned source, Site site) {
  if (current == nullptr) fail("%s:%d: a warp operation outside a kernel", site.file, site.line);
  return static_cast<Worker*>(current)->runner->warp(op, mask, value, source, site);
}

bool run(dim3 grid, dim3 block, cudaStream_t stream, void (*body)(void*), void* args,
         size_t bytes) {
  if (current != nullptr) fail("a kernel is launched from inside a kernel");
  const bool too_large = block.count() > kMaxBlock || block.z > 64 || grid.x > 0x7fffffffu ||
                         grid.y > 0xffffu || grid.z > 0xffffu;
  if (grid.count() == 0 || block.count() == 0 || too_large) return false;
  note({grid, block, stream});
  static std::mutex one_at_a_time;  // the memory checker has one history
  std::unique_lock<std::mutex> lock(one_at_a_time, std::defer_lock);
  if (memory_is_checked()) lock.lock();

  const uint64_t seed = seed_of_process;
  Random random(seed + 0x51ed27 * launch_of_seed++);
  LaunchState state;
  state.args = static_cast<const char*>(args);
  state.args_end = state.args + bytes;
  find_shared(state);
  std::unique_ptr<Stacks> stacks = stack_pool().take();
  state.stacks = stacks.get();
  Clock& clock = state.clock;
  clock.now = clock.launch = clock_of_process + 1;

  std::vector<uint64_t> order(grid.count());
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (seed != 0) {
    for (size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[random.below(static_cast<unsigned>(i))]);
    }
  }
  BlockRunner runner(block, state, seed != 0 ? &random : nullptr);
  for (const uint64_t number : order) {
    const auto at = static_cast<unsigned>(number / grid.x);
    const Block here{
        {static_cast<unsigned>(number % grid.x), at % grid.y, at / grid.y}, block, grid};
    clock.block = ++clock.now;
    if (seed != 0) fill_with_garbage(state, random);
    runner.run(here, body, args);
  }
  clock_of_process = clock.now;
  stack_pool().give_back(std::move(stacks));
  return true;
}

void set_seed(uint64_t seed) {
  seed_of_process = seed;
  launch_of_seed = 0;
}

}  // namespace cuda_host
