// The switch is a few instructions of assembly: swapcontext makes a system call, longjmp trips
// AddressSanitizer, and a kernel of 256 threads switches thousands of times for one row.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>

#include "engine.h"

extern "C" {
// Null unless the program is built with AddressSanitizer.
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* bottom,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* save, const void** old_bottom,
                                                           size_t* old_size);
void cuda_host_switch(void** save, void* load);
}

#if defined(__x86_64__)
asm(R"(
.text
.globl cuda_host_switch
.hidden cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, . - cuda_host_switch
)");
#else
#error "tests/cuda_host/fiber.cpp: write cuda_host_switch for this processor"
#endif

namespace cuda_host {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStack = 32 * kPage;

// Whom the running fiber was reached from: AddressSanitizer tells it the other's stack. Used from a
// switch to its end only, so it may lie in what is filled with garbage between blocks.
thread_local Fiber* came_from = nullptr;

void switch_away(Fiber& from, Fiber& to, bool for_good) {
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.sanitizer, to.stack, to.stack_size);
  }
  came_from = &from;
  cuda_host_switch(&from.stack_pointer, to.stack_pointer);
}

}  // namespace

void entered(Fiber& self) {
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(self.sanitizer, &came_from->stack, &came_from->stack_size);
  }
}

void switch_fiber(Fiber& from, Fiber& to) {
  switch_away(from, to, false);
  entered(from);
}

void leave_fiber(Fiber& from, Fiber& to) {
  switch_away(from, to, true);
  __builtin_unreachable();
}

void prepare(Fiber& fiber, void (*entry)()) {
  const auto top = (reinterpret_cast<uintptr_t>(fiber.stack) + fiber.stack_size) & ~uintptr_t{15};
  auto* frame = reinterpret_cast<uintptr_t*>(top) - 8;  // six registers, the entry, no caller
  for (int i = 0; i < 8; ++i) frame[i] = 0;
  frame[6] = reinterpret_cast<uintptr_t>(entry);
  fiber.stack_pointer = frame;
  fiber.sanitizer = nullptr;
}

Stacks::Stacks() : bytes_(kMaxBlock * (kStack + kPage)) {
  base_ = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base_ == MAP_FAILED) throw std::runtime_error("cuda_host: no memory for stacks");
  for (unsigned i = 0; i < kMaxBlock; ++i) {
    Fiber fiber;
    assign(fiber, i);
    if (mprotect(const_cast<void*>(fiber.stack), kStack, PROT_READ | PROT_WRITE) != 0) {
      throw std::runtime_error("cuda_host: no memory for stacks");
    }
  }
}

Stacks::~Stacks() { munmap(base_, bytes_); }

void Stacks::assign(Fiber& fiber, unsigned number) const {
  fiber.stack = static_cast<char*>(base_) + number * (kStack + kPage) + kPage;
  // Not all at one distance: the tops of the stacks would share a few sets of the cache.
  fiber.stack_size = kStack - number % 64 * 576;
}

}  // namespace cuda_host
