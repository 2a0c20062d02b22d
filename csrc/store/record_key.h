// The key of a record: a hash of the token ids that are scored, with the border between prompt and
// completion in it.
//
//   key = BLAKE2b-128( number of prompt tokens, u64 | prompt ids, u32 each | completion ids, u32 )
//
// all little-endian. Nothing else enters, so the same record has the same key in every data set,
// order, epoch, and on every platform.
#pragma once

#include <cstdint>
#include <span>

namespace fusedpo {

// Sequences of token ids, one after another: sequence i is ids[offsets[i] .. offsets[i + 1]).
struct IdLists {
  std::span<const std::int64_t> ids;
  std::span<const std::int64_t> offsets;  // N + 1 of them, ascending, within `ids`
};

// Writes 16 bytes for each of the N records. Throws kEmptyCompletion, and kBadValue for an id
// outside [0, 2^32), offsets that do not fit, or lists of different lengths.
void record_keys(const IdLists& prompts, const IdLists& completions, unsigned char* keys);

}  // namespace fusedpo
