// Bytes of a log: header, records, token values, commit markers. docs/store_format.md draws them.
//
// A log is a sequence of 32-byte cells. Everything is little-endian and covered by a checksum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "store/bytes.h"
#include "store/crc32c.h"

namespace fusedpo {

inline constexpr std::uint32_t kFormatVersion = 1;
inline constexpr std::uint32_t kByteOrder = 0x01020304u;
inline constexpr std::size_t kCell = 32;
inline constexpr std::size_t kLogHeader = 2 * kCell;
inline constexpr std::size_t kMarkerPair = 2 * kCell;  // a marker is written twice
inline constexpr std::uint32_t kHasTokens = 0x80000000u;
inline constexpr std::uint32_t kMaxTokens = kHasTokens - 1;
// ASCII, so that read as floats both halves are positive: no token value can look like a marker.
inline constexpr unsigned char kLogMagic[8] = {'f', 'd', 'p', 'o', '.', 'l', 'o', 'g'};
inline constexpr unsigned char kMarkerMagic[8] = {'f', 'd', 'p', 'o', '.', 's', 'y', 'n'};

inline std::uint32_t masked_crc(const void* data, std::size_t size) {
  return mask_crc32c(crc32c(data, size));
}

// key[16] | logp f64 | num_tokens u32 (bit 31: token values follow) | crc32c u32
struct Record {
  Key key;
  double logp = 0;
  std::uint32_t num_tokens = 0;
  bool has_tokens = false;

  void encode(unsigned char* cell) const {
    key.store(cell);
    store_le(cell + 16, logp);
    store_le(cell + 24, has_tokens ? num_tokens | kHasTokens : num_tokens);
    store_le(cell + 28, masked_crc(cell, 28));
  }
  // False when the checksum does not hold.
  bool decode(const unsigned char* cell) {
    if (load_le<std::uint32_t>(cell + 28) != masked_crc(cell, 28)) return false;
    key = Key::load(cell);
    logp = load_le<double>(cell + 16);
    const auto word = load_le<std::uint32_t>(cell + 24);
    num_tokens = word & kMaxTokens;
    has_tokens = (word & kHasTokens) != 0;
    return true;
  }
};

// What follows a record that has token values: f32[num_tokens] | crc32c u32 | zeros to a full cell.
// The checksum covers the key, too, so that values cannot be taken for another record's.
inline std::uint64_t token_bytes(std::uint32_t num_tokens) {
  return (std::uint64_t{num_tokens} * 4 + 4 + kCell - 1) / kCell * kCell;
}

inline std::uint32_t token_crc(const Key& key, const void* values, std::size_t bytes) {
  unsigned char raw[16];
  key.store(raw);
  return mask_crc32c(crc32c(values, bytes, crc32c(raw, sizeof raw)));
}

// magic[8] | byte order u32 | version u32 | identity[16] | log id u64 | zeros[20] | crc32c u32
struct LogHeader {
  Digest identity{};
  std::uint64_t log_id = 0;

  void encode(unsigned char* bytes) const {
    std::memset(bytes, 0, kLogHeader);
    std::memcpy(bytes, kLogMagic, sizeof kLogMagic);
    store_le(bytes + 8, kByteOrder);
    store_le(bytes + 12, kFormatVersion);
    std::memcpy(bytes + 16, identity.data(), identity.size());
    store_le(bytes + 32, log_id);
    store_le(bytes + 60, masked_crc(bytes, 60));
  }
};

// magic[8] | offset of the first copy u64 (bit 63: the writer closed the log) | log id u64 |
// crc32c of all bytes since the previous marker u32 | crc32c of this marker u32
struct Marker {
  std::uint64_t offset = 0;
  bool closed = false;
  std::uint64_t log_id = 0;
  std::uint32_t range_crc = 0;

  static constexpr std::uint64_t kClosedBit = std::uint64_t{1} << 63;

  void encode(unsigned char* cell) const {
    std::memcpy(cell, kMarkerMagic, sizeof kMarkerMagic);
    store_le(cell + 8, closed ? offset | kClosedBit : offset);
    store_le(cell + 16, log_id);
    store_le(cell + 24, range_crc);
    store_le(cell + 28, masked_crc(cell, 28));
  }
  static bool is_marker(const unsigned char* cell) {
    return std::memcmp(cell, kMarkerMagic, sizeof kMarkerMagic) == 0;
  }
  // False when it is no marker or its checksum does not hold.
  bool decode(const unsigned char* cell) {
    if (!is_marker(cell) || load_le<std::uint32_t>(cell + 28) != masked_crc(cell, 28)) return false;
    const auto word = load_le<std::uint64_t>(cell + 8);
    offset = word & ~kClosedBit;
    closed = (word & kClosedBit) != 0;
    log_id = load_le<std::uint64_t>(cell + 16);
    range_crc = load_le<std::uint32_t>(cell + 24);
    return true;
  }
};

}  // namespace fusedpo
