#include "block_runner.h"

#include <cstdio>
#include <utility>

namespace cuda_host {
namespace {

const char* name_of(WarpOp op) {
  constexpr const char* kNames[] = {"__syncwarp",        "a shuffle",         "__all_sync",
                                    "__any_sync",        "__ballot_sync",     "__reduce_add_sync",
                                    "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync",
                                    "__reduce_or_sync",  "__reduce_xor_sync"};
  return kNames[static_cast<int>(op)];
}

bool same_place(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

uint64_t combine(WarpOp op, uint64_t a, uint64_t b) {
  const bool less = static_cast<int64_t>(b) < static_cast<int64_t>(a);
  switch (op) {
    case WarpOp::kAll:
    case WarpOp::kAnd:
      return a & b;
    case WarpOp::kAny:
    case WarpOp::kBallot:
    case WarpOp::kOr:
      return a | b;
    case WarpOp::kXor:
      return a ^ b;
    case WarpOp::kMin:
      return less ? b : a;
    case WarpOp::kMax:
      return less ? a : b;
    default:
      return a + b;
  }
}

// Gives every lane of `mask` its result.
void complete(WarpOp op, uint32_t mask, Worker* lanes) {
  if (op == WarpOp::kShuffle) {
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      Worker& w = lanes[__builtin_ctz(rest)];
      w.result = lanes[w.source].value;
    }
    return;
  }
  uint64_t all = lanes[__builtin_ctz(mask)].value;
  for (uint32_t rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
    all = combine(op, all, lanes[__builtin_ctz(rest)].value);
  }
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) lanes[__builtin_ctz(rest)].result = all;
}

}  // namespace

BlockRunner::BlockRunner(dim3 size, LaunchState& launch, Random* random)
    : launch_(launch),
      random_(random),
      count_(static_cast<unsigned>(size.count())),
      workers_(count_),
      ready_(count_),
      meetings_((count_ + kWarp - 1) / kWarp) {
  for (unsigned i = 0; i < count_; ++i) {
    Worker& w = workers_[i];
    w.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    w.number = i;
    w.lane = i % kWarp;
    w.runner = this;
    w.launch = &launch;
    launch.stacks->assign(w.fiber, i);
  }
}

void BlockRunner::run(const Block& block, void (*body)(void*), void* args) {
  body_ = body;
  args_ = args;
  head_ = ready_count_ = done_ = at_barrier_ = 0;
  for (Worker& w : workers_) {
    w.block = &block;
    prepare(w.fiber, &BlockRunner::enter);
    make_ready(w);
  }
  Worker& first = next();
  current = &first;
  switch_fiber(outside_, first.fiber);
  current = nullptr;
  if (done_ != count_) report_deadlock();
}

void BlockRunner::enter() {
  Worker& self = *static_cast<Worker*>(current);
  entered(self.fiber);
  self.runner->body_(self.runner->args_);
  self.runner->end();
}

void BlockRunner::end() {
  Worker& self = *static_cast<Worker*>(current);
  for (const Meeting& m : meetings_[self.number / kWarp]) {
    if ((m.mask >> self.lane & 1u) != 0) {
      fail("%s:%d: lanes wait in %s with mask %08x, but lane %u of the warp has ended", m.site.file,
           m.site.line, name_of(m.op), m.mask, self.lane);
    }
  }
  if (at_barrier_ != 0) {
    fail("%s:%d: %u threads wait in __syncthreads, but thread %u of their block has ended",
         barrier_site_.file, barrier_site_.line, at_barrier_, self.number);
  }
  self.wait = Worker::Wait::kDone;
  ++done_;
  Fiber* to = &outside_;
  if (ready_count_ != 0) {
    Worker& w = next();
    current = &w;
    to = &w.fiber;
  }
  leave_fiber(self.fiber, *to);
}

int BlockRunner::barrier(Vote vote, int predicate, Site site) {
  Worker& self = *static_cast<Worker*>(current);
  if (done_ != 0) {
    fail("%s:%d: thread %u waits in __syncthreads, but another thread of its block has ended",
         site.file, site.line, self.number);
  }
  if (at_barrier_ == 0) {
    barrier_site_ = site;
    votes_for_ = 0;
  } else if (!same_place(site, barrier_site_)) {
    fail("threads of one block wait in different __syncthreads: %s:%d and, thread %u, %s:%d",
         barrier_site_.file, barrier_site_.line, self.number, site.file, site.line);
  }
  self.site = site;
  votes_for_ += predicate != 0;
  if (++at_barrier_ < count_) {
    self.wait = Worker::Wait::kBarrier;
    give_way(self);
    return static_cast<int>(self.result);
  }
  at_barrier_ = 0;
  ++launch_.clock.now;
  const unsigned n = votes_for_;
  const unsigned result = vote == Vote::kCount ? n : vote == Vote::kAnd ? n == count_ : n != 0;
  for (Worker& w : workers_) {
    w.result = result;
    if (&w != &self) make_ready(w);
  }
  pass_on(self);
  return static_cast<int>(result);
}

uint64_t BlockRunner::warp(WarpOp op, uint32_t mask, uint64_t value, unsigned source, Site site) {
  Worker& self = *static_cast<Worker*>(current);
  if ((mask >> self.lane & 1u) == 0) {
    fail("%s:%d: lane %u calls %s with mask %08x, which it is not in", site.file, site.line,
         self.lane, name_of(op), mask);
  }
  if (op == WarpOp::kShuffle && (mask >> source & 1u) == 0) {
    fail("%s:%d: lane %u reads from lane %u, which is not in mask %08x", site.file, site.line,
         self.lane, source, mask);
  }
  self.op = op;
  self.mask = mask;
  self.value = op == WarpOp::kBallot ? value << self.lane : value;
  self.source = source;
  self.site = site;
  Meeting& meeting = join(self);
  if (meeting.arrived != mask) {
    self.wait = Worker::Wait::kWarp;
    give_way(self);
    return self.result;
  }
  std::vector<Meeting>& open = meetings_[self.number / kWarp];
  meeting = open.back();
  open.pop_back();
  Worker* const lanes = &self - self.lane;
  complete(op, mask, lanes);
  if (op == WarpOp::kSync && mask == ~0u) ++launch_.clock.warp[self.number / kWarp];
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    Worker& w = lanes[__builtin_ctz(rest)];
    if (&w != &self) make_ready(w);
  }
  pass_on(self);
  return self.result;
}

BlockRunner::Meeting& BlockRunner::join(const Worker& self) {
  std::vector<Meeting>& open = meetings_[self.number / kWarp];
  for (Meeting& m : open) {
    if (m.op == self.op && m.mask == self.mask && same_place(m.site, self.site)) {
      m.arrived |= 1u << self.lane;
      return m;
    }
  }
  const unsigned first = self.number - self.lane;
  for (uint32_t rest = self.mask; rest != 0; rest &= rest - 1) {
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
    const bool exists = first + lane < count_;
    if (!exists || workers_[first + lane].wait == Worker::Wait::kDone) {
      fail("%s:%d: %s names lane %u in its mask %08x, which %s", self.site.file, self.site.line,
           name_of(self.op), lane, self.mask, exists ? "has ended" : "the block does not have");
    }
  }
  open.push_back({self.op, self.mask, 1u << self.lane, self.site});
  return open.back();
}

// ---- who runs next ------------------------------------------------------------------

void BlockRunner::make_ready(Worker& worker) {
  worker.wait = Worker::Wait::kNothing;
  unsigned at = head_ + ready_count_++;
  if (at >= count_) at -= count_;
  ready_[at] = &worker;
}

Worker& BlockRunner::next() {
  if (random_ != nullptr) {
    unsigned at = head_ + random_->below(ready_count_);
    if (at >= count_) at -= count_;
    std::swap(ready_[head_], ready_[at]);
  }
  Worker& w = *ready_[head_];
  head_ = head_ + 1 == count_ ? 0 : head_ + 1;
  --ready_count_;
  return w;
}

// Another thread runs until somebody makes `self` ready and its turn comes.
void BlockRunner::give_way(Worker& self) {
  if (ready_count_ == 0) report_deadlock();
  Worker& w = next();
  current = &w;
  switch_fiber(self.fiber, w.fiber);
}

// The thread that arrives last need not be the first to go on.
void BlockRunner::pass_on(Worker& self) {
  if (random_ == nullptr) return;
  make_ready(self);
  Worker& w = next();
  if (&w == &self) return;
  current = &w;
  switch_fiber(self.fiber, w.fiber);
}

void BlockRunner::report_deadlock() const {
  for (const Worker& w : workers_) {
    if (w.number > 0 && same_place(w.site, workers_[w.number - 1].site)) continue;
    const bool at_barrier = w.wait == Worker::Wait::kBarrier;
    std::fprintf(stderr, "cuda_host: thread %u and those after it wait in %s at %s:%d\n", w.number,
                 at_barrier ? "__syncthreads" : name_of(w.op), w.site.file, w.site.line);
  }
  fail("no thread of the block can go on: they wait for each other at different places");
}

}  // namespace cuda_host
