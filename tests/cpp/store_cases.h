// Records and stores that the store's tests share.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "fault_file_system.h"
#include "store/blake2b.h"
#include "store/log_writer.h"
#include "store/store.h"

namespace fusedpo {

inline const StoreIdentity& test_identity() {
  static const StoreIdentity identity = make_identity(R"({"model":"a \"tiny\" one"})", 1e-6);
  return identity;
}

inline Key key_of(std::uint64_t i) {
  unsigned char bytes[8];
  store_le(bytes, i);
  const Digest digest = blake2b_128(bytes, sizeof bytes);
  return Key::load(digest.data());
}

inline double logp_of(std::uint64_t i) { return -0.5 - static_cast<double>(i % 1000) / 7; }
inline std::uint32_t num_tokens_of(std::uint64_t i) {
  return static_cast<std::uint32_t>(1 + i % 13);
}
inline std::vector<float> tokens_of(std::uint64_t i) {
  std::vector<float> values(num_tokens_of(i));
  for (std::size_t t = 0; t < values.size(); ++t)
    values[t] = -static_cast<float>(i % 97) / static_cast<float>(t + 3);
  return values;
}

// Record i for every i of `ids`; with token values, if wanted.
inline void append(LogWriter& writer, const std::vector<std::uint64_t>& ids, bool tokens = false) {
  std::vector<unsigned char> keys(16 * ids.size());
  std::vector<double> logps;
  std::vector<std::uint32_t> num_tokens;
  std::vector<float> values;
  for (std::size_t j = 0; j < ids.size(); ++j) {
    key_of(ids[j]).store(keys.data() + 16 * j);
    logps.push_back(logp_of(ids[j]));
    num_tokens.push_back(num_tokens_of(ids[j]));
    const std::vector<float> own = tokens_of(ids[j]);
    values.insert(values.end(), own.begin(), own.end());
  }
  if (!tokens) values.clear();
  writer.append({keys, logps, num_tokens, values, tokens});
}

inline std::vector<std::uint64_t> range(std::uint64_t begin, std::uint64_t end) {
  std::vector<std::uint64_t> ids;
  for (; begin < end; ++begin) ids.push_back(begin);
  return ids;
}

inline LogWriter writer_on(FileSystem& files, std::uint64_t log_id, const std::string& name = "w") {
  return LogWriter(files, "s", name, test_identity().digest, log_id);
}

// What a view says about record i, checked to be right if it is there.
enum class Seen { kAbsent, kPlain, kTokens, kWrong };

inline Seen look(const View& view, std::uint64_t i) {
  unsigned char key[16];
  key_of(i).store(key);
  Record record;
  view.lookup(key, 1, &record);
  if (record.num_tokens == 0) return Seen::kAbsent;
  if (record.num_tokens != num_tokens_of(i) || record.logp != logp_of(i)) return Seen::kWrong;
  if (!record.has_tokens) return Seen::kPlain;
  std::vector<float> values(record.num_tokens);
  view.lookup_tokens(key, &record, 1, values.data());
  return values == tokens_of(i) ? Seen::kTokens : Seen::kWrong;
}

}  // namespace fusedpo
