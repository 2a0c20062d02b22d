// CRC-32C (Castagnoli polynomial 0x1EDC6F41, RFC 3720): the checksum of the records of the
// reference store. Every burst of up to 32 flipped bits is detected.
//
// Motivation for masking: a checksum of bytes that contain their own checksum is a constant, so a
// record that is copied into another record would weaken the outer checksum. A checksum is
// therefore stored in its masked form only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedpo {

// CRC-32C of `size` bytes at `data`, appended to the bytes that gave `crc`:
//   crc32c(ab, n + m) == crc32c(ab + n, m, crc32c(ab, n))
std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc = 0);

// The form in which a checksum is stored: LevelDB's rotation by 15 bits plus a constant.
constexpr std::uint32_t mask_crc32c(std::uint32_t crc) {
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

constexpr std::uint32_t unmask_crc32c(std::uint32_t masked) {
  const std::uint32_t rotated = masked - 0xa282ead8u;
  return (rotated << 15) | (rotated >> 17);
}

}  // namespace fusedpo
