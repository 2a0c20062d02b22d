// BLAKE2b (RFC 7693), unkeyed, any digest size: the content hash of the reference store.
//
// Why this hash: 128 bits of a cryptographic hash make an accidental or a provoked collision of two
// sequences out of the question, it is specified by an RFC with published vectors, Python has it
// as hashlib.blake2b(digest_size=16), so that anybody can compute a key, and it is fast enough
// (a sequence of a thousand tokens takes microseconds, its forward pass milliseconds).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "store/bytes.h"

namespace fusedpo {

class Blake2b {
 public:
  // `digest_size` in 1..64; digests of different sizes are unrelated.
  explicit Blake2b(std::size_t digest_size = 16);

  Blake2b& update(const void* data, std::size_t size);

  // Writes `digest_size` bytes; the object is spent afterwards.
  void finish(unsigned char* digest);

 private:
  void compress(const unsigned char* block, std::uint64_t final_mask);

  std::array<std::uint64_t, 8> state_;
  std::array<unsigned char, 128> buffer_{};
  std::size_t buffered_ = 0;
  std::uint64_t count_low_ = 0, count_high_ = 0;
  std::size_t digest_size_;
};

// The 16-byte digest of `size` bytes.
Digest blake2b_128(const void* data, std::size_t size);

}  // namespace fusedpo
