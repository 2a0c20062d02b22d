// A stack of one's own and the switch between two of them.
#pragma once

#include <cstddef>

namespace cuda_host {

struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;  // lowest address
  size_t stack_size = 0;
  void* sanitizer = nullptr;  // what AddressSanitizer keeps while the fiber is away
};

// Makes `fiber` start at `entry`, which must not return, when first switched to.
void prepare(Fiber& fiber, void (*entry)());

// Leaves `from` for `to`; comes back when something switches to `from`.
void switch_fiber(Fiber& from, Fiber& to);

// The first thing an entry must call.
void entered(Fiber& self);

// Leaves `from` for good.
[[noreturn]] void leave_fiber(Fiber& from, Fiber& to);

// Stacks for the threads of one block, with an inaccessible page below each.
class Stacks {
 public:
  Stacks();
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  void assign(Fiber& fiber, unsigned number) const;
  bool contains(const void* at) const {
    return at >= base_ && at < static_cast<const char*>(base_) + bytes_;
  }

 private:
  void* base_;
  size_t bytes_;
};

}  // namespace cuda_host
