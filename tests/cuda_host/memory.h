// Memory that kernels may touch. The memory checker knows what lies in it and refuses the rest;
// AddressSanitizer guards both its ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_host {

// What the checker remembers of one byte: the last accesses, each by thread, step of the launch's
// clock and step of the thread's warp.
struct ByteHistory {
  uint64_t write = 0, read = 0;
  uint64_t read_by_other_block = 0;  // the launch in which that was so
  uint32_t write_warp_step = 0, read_warp_step = 0;
  uint16_t writer = 0, reader = 0;
};

class DeviceMemory {
 public:
  // `bytes` that start `offset` bytes past a multiple of 256, filled with garbage. Kernels may not
  // read what neither they nor the host has written.
  explicit DeviceMemory(size_t bytes, size_t offset = 0);
  virtual ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* data() const { return begin_; }
  size_t size() const { return static_cast<size_t>(end_ - begin_); }

  // The host has written, or may have: kernels may read.
  void set_written() { written_by_host_ = true; }
  void note_written(const void* at, size_t bytes);
  // No kernel may touch [from, to) from now on: the gap between two rows.
  void forbid(size_t from, size_t to);

  // The memory that `at` lies in, or null.
  static DeviceMemory* find(const void* at);

  // For the checker; without a history it looks at the bounds alone.
  bool has_history() const { return allocation_ != nullptr; }
  bool written_by_host() const { return written_by_host_; }
  bool forbidden(size_t at) const { return !forbidden_.empty() && forbidden_[at]; }
  ByteHistory* history();

 protected:
  DeviceMemory(void* begin, size_t bytes);
  void forget();

 private:
  void* allocation_ = nullptr;
  char *begin_, *end_;
  bool written_by_host_ = false;
  std::vector<bool> forbidden_;
  std::vector<ByteHistory> history_;
};

// Zeros, as many as the address space has room for: pages exist once they are touched.
class ReservedMemory : public DeviceMemory {
 public:
  explicit ReservedMemory(size_t bytes);
  ~ReservedMemory() override;
};

}  // namespace cuda_host
