// Arrays of "device" memory for tests, guarded at both ends (tests/cuda_host/memory.h).
#pragma once

#include <algorithm>
#include <vector>

#include "memory.h"

namespace fusedpo {

template <typename T>
class DeviceArray {
 public:
  // Unwritten. `offset` elements past a multiple of 256 bytes.
  explicit DeviceArray(size_t count, size_t offset = 0)
      : memory_(count * sizeof(T), offset * sizeof(T)), count_(count) {}

  explicit DeviceArray(const std::vector<T>& values, size_t offset = 0)
      : DeviceArray(values.size(), offset) {
    std::copy(values.begin(), values.end(), data());
    memory_.set_written();
  }

  T* data() const { return static_cast<T*>(memory_.data()); }
  size_t size() const { return count_; }
  std::vector<T> host() const { return std::vector<T>(data(), data() + count_); }
  // Elements [from, to) lie between two rows.
  void forbid(size_t from, size_t to) { memory_.forbid(from * sizeof(T), to * sizeof(T)); }

 private:
  cuda_host::DeviceMemory memory_;
  size_t count_;
};

}  // namespace fusedpo
