// The threads of one block: who runs, who waits for what, and what is an error.
#pragma once

#include <vector>

#include "engine.h"
#include "fiber.h"

namespace cuda_host {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 0x1234567) {}
  uint64_t operator()() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  unsigned below(unsigned n) { return static_cast<unsigned>(((*this)() >> 32) * n >> 32); }

 private:
  uint64_t state_;
};

// Steps of the launches of a process, counted without end. Of two accesses in one block the one at
// an earlier step was before a barrier that the other was after.
struct Clock {
  uint64_t now = 1;
  uint64_t launch = 1, block = 1;         // when the running ones began
  uint32_t warp[kMaxBlock / kWarp] = {};  // __syncwarp of a whole warp, one count for each
};

// What a launch has besides its threads; the memory checker reads it.
struct LaunchState {
  Clock clock;
  const Stacks* stacks = nullptr;
  const char *args = nullptr, *args_end = nullptr;      // the kernel's parameters
  const char *shared = nullptr, *shared_end = nullptr;  // where __shared__ variables lie
};

class BlockRunner;

// A thread, what it waits for and what it gets.
struct Worker : Thread {
  enum class Wait { kNothing, kBarrier, kWarp, kDone };

  BlockRunner* runner = nullptr;
  LaunchState* launch = nullptr;
  Fiber fiber;
  Wait wait = Wait::kNothing;
  Site site{};
  WarpOp op{};
  uint32_t mask = 0;
  unsigned source = 0;
  uint64_t value = 0, result = 0;
};

// Runs blocks of one launch, one after another.
class BlockRunner {
 public:
  // With `random` every choice of the thread that runs next is random; without, threads take turns.
  BlockRunner(dim3 size, LaunchState& launch, Random* random);

  void run(const Block& block, void (*body)(void*), void* args);

  // For the running thread: see engine.h.
  int barrier(Vote vote, int predicate, Site site);
  uint64_t warp(WarpOp op, uint32_t mask, uint64_t value, unsigned source, Site site);

 private:
  // A warp operation that some lanes have reached and others have not.
  struct Meeting {
    WarpOp op;
    uint32_t mask, arrived;
    Site site;
  };

  [[noreturn]] static void enter();
  [[noreturn]] void end();
  Meeting& join(const Worker& self);
  void make_ready(Worker& worker);
  Worker& next();
  void give_way(Worker& self);
  void pass_on(Worker& self);
  [[noreturn]] void report_deadlock() const;

  LaunchState& launch_;
  Random* const random_;
  const unsigned count_;
  std::vector<Worker> workers_;
  std::vector<Worker*> ready_;  // a ring of ready_count_ from head_
  unsigned head_ = 0, ready_count_ = 0, done_ = 0;
  std::vector<std::vector<Meeting>> meetings_;  // by warp
  unsigned at_barrier_ = 0, votes_for_ = 0;
  Site barrier_site_{};
  Fiber outside_;
  void (*body_)(void*) = nullptr;
  void* args_ = nullptr;
};

}  // namespace cuda_host
