#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "cuda_host.h"

extern "C" {
// Null unless the program is linked with memory_check.cpp.
__attribute__((weak)) void __tsan_init();
// Null unless the program is built with AddressSanitizer.
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* at, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* at, size_t bytes);
}

namespace cuda_host {

bool memory_is_checked() { return __tsan_init != nullptr; }

namespace {

std::mutex mutex;
std::map<const char*, DeviceMemory*> by_begin;

void* allocate(size_t bytes) {
  void* at = nullptr;
  if (posix_memalign(&at, 256, bytes) != 0) throw std::bad_alloc();
  return at;
}

}  // namespace

DeviceMemory::DeviceMemory(void* begin, size_t bytes)
    : begin_(static_cast<char*>(begin)), end_(begin_ + bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  by_begin[begin_] = this;
}

DeviceMemory::DeviceMemory(size_t bytes, size_t offset)
    : DeviceMemory(static_cast<char*>(allocate(offset + bytes)) + offset, bytes) {
  allocation_ = begin_ - offset;
  std::memset(begin_, 0xa5, bytes);  // no result is made of these bytes
  if (__asan_poison_memory_region != nullptr) __asan_poison_memory_region(allocation_, offset);
}

DeviceMemory::~DeviceMemory() {
  forget();
  if (__asan_unpoison_memory_region != nullptr && allocation_ != nullptr) {
    __asan_unpoison_memory_region(allocation_,
                                  static_cast<size_t>(begin_ - static_cast<char*>(allocation_)));
  }
  std::free(allocation_);
}

void DeviceMemory::forget() {
  const std::lock_guard<std::mutex> lock(mutex);
  by_begin.erase(begin_);
}

ReservedMemory::ReservedMemory(size_t bytes)
    : DeviceMemory(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0),
                   bytes) {
  if (data() == MAP_FAILED) throw std::bad_alloc();
  set_written();
}

ReservedMemory::~ReservedMemory() {
  forget();
  munmap(data(), size());
}

void DeviceMemory::note_written(const void* at, size_t bytes) {
  if (!memory_is_checked() || !has_history()) return;
  ByteHistory* byte = history() + (static_cast<const char*>(at) - begin_);
  for (size_t i = 0; i < bytes; ++i) byte[i].write = 1;
}

void DeviceMemory::forbid(size_t from, size_t to) {
  forbidden_.resize(size());
  for (size_t i = from; i < to; ++i) forbidden_[i] = true;
}

DeviceMemory* DeviceMemory::find(const void* at) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto after = by_begin.upper_bound(static_cast<const char*>(at));
  if (after == by_begin.begin()) return nullptr;
  DeviceMemory* memory = (--after)->second;
  return at < memory->end_ ? memory : nullptr;
}

ByteHistory* DeviceMemory::history() {
  history_.resize(size());
  return history_.data();
}

}  // namespace cuda_host
