// Little-endian loads and stores at any alignment; 128-bit keys in the order of their bytes.
#pragma once

#include <array>
#include <bit>
#include <compare>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fusedpo {

using Digest = std::array<unsigned char, 16>;

template <class T>
T reverse_bytes(T value) {
  std::array<unsigned char, sizeof(T)> bytes, reversed;
  std::memcpy(bytes.data(), &value, sizeof value);
  for (std::size_t i = 0; i < sizeof value; ++i) reversed[i] = bytes[sizeof value - 1 - i];
  std::memcpy(&value, reversed.data(), sizeof value);
  return value;
}

template <class T>
T load_le(const void* from) {
  static_assert(std::is_trivially_copyable_v<T>);
  T value;
  std::memcpy(&value, from, sizeof value);
  return std::endian::native == std::endian::little ? value : reverse_bytes(value);
}

template <class T>
void store_le(void* to, T value) {
  static_assert(std::is_trivially_copyable_v<T>);
  if constexpr (std::endian::native != std::endian::little) value = reverse_bytes(value);
  std::memcpy(to, &value, sizeof value);
}

// A key as two numbers, so that comparing them is comparing the 16 bytes like memcmp.
struct Key {
  std::uint64_t high = 0, low = 0;

  static Key load(const void* bytes) {
    const auto* p = static_cast<const unsigned char*>(bytes);
    const auto high = load_le<std::uint64_t>(p), low = load_le<std::uint64_t>(p + 8);
    return {reverse_bytes(high), reverse_bytes(low)};
  }
  void store(void* bytes) const {
    auto* p = static_cast<unsigned char*>(bytes);
    store_le(p, reverse_bytes(high));
    store_le(p + 8, reverse_bytes(low));
  }
  auto operator<=>(const Key&) const = default;
};

}  // namespace fusedpo
