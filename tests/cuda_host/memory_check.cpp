// Checks every access of a kernel to memory. Sources built with -fsanitize=thread call the
// functions at the end of this file before each load and store; linked without that flag, they come
// here instead of into ThreadSanitizer, which knows no barriers of a block. An error is:
//
//   * an address outside every DeviceMemory, the __shared__ variables and the thread's own locals
//   * reading what nobody has written: in this block for __shared__ variables, ever for others
//   * two threads of a block at one byte, one of them writing, without __syncthreads between them
//     or, in one warp, __syncwarp (a shuffle orders no memory)
//   * two blocks of a launch at one byte, one of them writing
//   * an address that the access is not aligned to
//
// So a missing barrier is found in every order of the threads, not only in the unlucky ones.
#include <dlfcn.h>
#include <link.h>

#include "block_runner.h"
#include "memory.h"

namespace cuda_host {
namespace {

// As reader: more than one thread since the last barrier.
constexpr uint16_t kLanesOfOneWarp = 0x8000;  // + warp
constexpr uint16_t kSeveralWarps = 0xffff;

struct Access {
  const char* at;
  size_t bytes;
  bool write;
  const void* caller;
};

[[noreturn]] void report(const Access& access, const char* what) {
  Dl_info info{};
  dladdr(access.caller, &info);
  const Block& block = *current->block;
  fail("%s: a %s of %zu bytes at %p by thread %u of block (%u, %u, %u); addr2line -e %s %#tx", what,
       access.write ? "write" : "read", access.bytes, static_cast<const void*>(access.at),
       current->number, block.index.x, block.index.y, block.index.z,
       info.dli_fname == nullptr ? "?" : info.dli_fname,
       static_cast<const char*>(access.caller) - static_cast<const char*>(info.dli_fbase) - 1);
}

// Whether what thread `other` did at `step` was before what the running thread does now.
bool is_ordered(const Worker& me, uint64_t step, uint16_t other, uint32_t warp_step) {
  const Clock& clock = me.launch->clock;
  if (step < clock.launch) return true;
  if (step < clock.block) return false;
  if (step < clock.now || other == me.number) return true;
  const unsigned warp = me.number / kWarp;
  const bool my_warp =
      other == (kLanesOfOneWarp | warp) || (other < kMaxBlock && other / kWarp == warp);
  return my_warp && warp_step < clock.warp[warp];
}

void note_read(const Worker& me, ByteHistory& byte) {
  const Clock& clock = me.launch->clock;
  const unsigned warp = me.number / kWarp;
  uint16_t reader = static_cast<uint16_t>(me.number);
  if (byte.read == clock.now && byte.reader != reader) {
    const bool my_warp = byte.reader == (kLanesOfOneWarp | warp) ||
                         (byte.reader < kMaxBlock && byte.reader / kWarp == warp);
    reader = my_warp ? static_cast<uint16_t>(kLanesOfOneWarp | warp) : kSeveralWarps;
  } else if (byte.read >= clock.launch && byte.read < clock.block) {
    byte.read_by_other_block = clock.launch;
  }
  byte.read = clock.now;
  byte.reader = reader;
  byte.read_warp_step = clock.warp[warp];
}

void check_byte(const Worker& me, const Access& access, ByteHistory& byte) {
  const Clock& clock = me.launch->clock;
  if (!is_ordered(me, byte.write, byte.writer, byte.write_warp_step)) {
    report(access, byte.write < clock.block ? "another block of the launch has written here"
                                            : "no barrier since another thread has written here");
  }
  if (!access.write) return note_read(me, byte);
  if (byte.read_by_other_block == clock.launch ||
      (byte.read >= clock.launch && byte.read < clock.block)) {
    report(access, "another block of the launch has read here");
  }
  if (!is_ordered(me, byte.read, byte.reader, byte.read_warp_step)) {
    report(access, "no barrier since another thread has read here");
  }
  byte.write = clock.now;
  byte.writer = static_cast<uint16_t>(me.number);
  byte.write_warp_step = clock.warp[me.number / kWarp];
}

// Each block has shared memory of its own: what others did to these bytes is forgotten.
void check_shared(const Worker& me, const Access& access) {
  static std::vector<ByteHistory> history;
  const LaunchState& launch = *me.launch;
  history.resize(static_cast<size_t>(launch.shared_end - launch.shared));
  const auto first = static_cast<size_t>(access.at - launch.shared);
  for (size_t i = first; i < first + access.bytes; ++i) {
    if (history[i].write < launch.clock.block) history[i].write = 0;
    if (history[i].read < launch.clock.block) history[i].read = 0;
    history[i].read_by_other_block = 0;
    if (!access.write && history[i].write == 0) {
      report(access, "no thread of this block has written this shared memory");
    }
    check_byte(me, access, history[i]);
  }
}

void check_device(const Worker& me, const Access& access, DeviceMemory& memory) {
  const auto first = static_cast<size_t>(access.at - static_cast<char*>(memory.data()));
  if (first + access.bytes > memory.size()) report(access, "past the end of a buffer");
  if (!memory.has_history()) return;
  ByteHistory* history = memory.history();
  for (size_t i = first; i < first + access.bytes; ++i) {
    if (memory.forbidden(i)) report(access, "between two rows");
    if (!access.write && !memory.written_by_host() && history[i].write == 0) {
      report(access, "nobody has written this memory");
    }
    check_byte(me, access, history[i]);
  }
}

// Constants of the program.
bool is_constant(const char* at) {
  return dl_iterate_phdr(
             [](dl_phdr_info* info, size_t, void* wanted) {
               for (int i = 0; i < info->dlpi_phnum; ++i) {
                 const auto& segment = info->dlpi_phdr[i];
                 const char* begin =
                     reinterpret_cast<const char*>(info->dlpi_addr + segment.p_vaddr);
                 if (segment.p_type == PT_LOAD && (segment.p_flags & PF_W) == 0 &&
                     wanted >= begin && wanted < begin + segment.p_memsz) {
                   return 1;
                 }
               }
               return 0;
             },
             const_cast<char*>(at)) != 0;
}

void check(const Access& access, size_t alignment) {
  if (current == nullptr) return;
  const Worker& me = *static_cast<const Worker*>(current);
  const LaunchState& launch = *me.launch;
  const char* at = access.at;
  const char* stack = static_cast<const char*>(me.fiber.stack);
  if (reinterpret_cast<uintptr_t>(at) % alignment != 0) report(access, "misaligned");
  if (at >= stack && at < stack + me.fiber.stack_size) return;
  if (at >= launch.shared && at < launch.shared_end) return check_shared(me, access);
  if (at >= launch.args && at < launch.args_end && !access.write) return;
  if (DeviceMemory* memory = DeviceMemory::find(at)) return check_device(me, access, *memory);
  if (!access.write && is_constant(at)) return;
  report(access,
         launch.stacks->contains(at) ? "another thread's local variable" : "outside every buffer");
}

}  // namespace
}  // namespace cuda_host

#define FUSEDPO_CHECK(name, bytes, write, alignment)                                            \
  extern "C" void __tsan_##name(const void* at) {                                               \
    cuda_host::check({static_cast<const char*>(at), bytes, write, __builtin_return_address(0)}, \
                     alignment);                                                                \
  }
FUSEDPO_CHECK(read1, 1, false, 1)
FUSEDPO_CHECK(read2, 2, false, 2)
FUSEDPO_CHECK(read4, 4, false, 4)
FUSEDPO_CHECK(read8, 8, false, 8)
FUSEDPO_CHECK(read16, 16, false, 16)
FUSEDPO_CHECK(write1, 1, true, 1)
FUSEDPO_CHECK(write2, 2, true, 2)
FUSEDPO_CHECK(write4, 4, true, 4)
FUSEDPO_CHECK(write8, 8, true, 8)
FUSEDPO_CHECK(write16, 16, true, 16)
FUSEDPO_CHECK(unaligned_read2, 2, false, 1)
FUSEDPO_CHECK(unaligned_read4, 4, false, 1)
FUSEDPO_CHECK(unaligned_read8, 8, false, 1)
FUSEDPO_CHECK(unaligned_read16, 16, false, 1)
FUSEDPO_CHECK(unaligned_write2, 2, true, 1)
FUSEDPO_CHECK(unaligned_write4, 4, true, 1)
FUSEDPO_CHECK(unaligned_write8, 8, true, 1)
FUSEDPO_CHECK(unaligned_write16, 16, true, 1)
#undef FUSEDPO_CHECK

extern "C" {
void __tsan_read_range(const void* at, size_t bytes) {
  cuda_host::check({static_cast<const char*>(at), bytes, false, __builtin_return_address(0)}, 1);
}
void __tsan_write_range(const void* at, size_t bytes) {
  cuda_host::check({static_cast<const char*>(at), bytes, true, __builtin_return_address(0)}, 1);
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
