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

inline std::uint32_t reverse_bytes(std::uint32_t value) { return __builtin_bswap32(value); }
inline std::uint64_t reverse_bytes(std::uint64_t value) { return __builtin_bswap64(value); }

// The unsigned integer of the same size, for byte orders.
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t>;

template <class T>
T load_le(const void* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  BitsOf<T> bits;
  std::memcpy(&bits, from, sizeof bits);
  if constexpr (std::endian::native != std::endian::little) bits = reverse_bytes(bits);
  return std::bit_cast<T>(bits);
}

template <class T>
void store_le(void* to, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  auto bits = std::bit_cast<BitsOf<T>>(value);
  if constexpr (std::endian::native != std::endian::little) bits = reverse_bytes(bits);
  std::memcpy(to, &bits, sizeof bits);
}

// A key as two numbers, so that comparing them is comparing the 16 bytes like memcmp.
struct Key {
  std::uint64_t high = 0, low = 0;

  static Key load(const void* bytes) {
    const auto* p = static_cast<const unsigned char*>(bytes);
    const auto high = load_le<std::uint64_t>(p), low = load_le<std::uint64_t>(p + 8);
    // The first byte counts most.
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
