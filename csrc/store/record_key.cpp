#include "store/record_key.h"

#include <string>
#include <vector>

#include "store/blake2b.h"
#include "store/error.h"

namespace fusedpo {
namespace {

[[noreturn]] void bad(StoreCode code, const std::string& message) {
  throw StoreError(code, "", std::nullopt, message);
}

void check_offsets(const IdLists& lists, const char* name) {
  const auto& offsets = lists.offsets;
  const auto size = static_cast<std::int64_t>(lists.ids.size());
  bool ascending = !offsets.empty() && offsets.front() >= 0 && offsets.back() <= size;
  for (std::size_t i = 1; ascending && i < offsets.size(); ++i)
    ascending = offsets[i - 1] <= offsets[i];
  if (!ascending)
    bad(StoreCode::kBadValue, std::string(name) +
                                  " offsets must ascend from 0 or more to at most " +
                                  std::to_string(size) + ", the number of ids");
}

void put_ids(std::vector<unsigned char>* bytes, const IdLists& lists, std::size_t record,
             const char* name) {
  for (std::int64_t i = lists.offsets[record]; i < lists.offsets[record + 1]; ++i) {
    const std::int64_t id = lists.ids[static_cast<std::size_t>(i)];
    if (id < 0 || id > std::int64_t{0xffffffff})
      bad(StoreCode::kBadValue, std::string(name) + " " + std::to_string(record) +
                                    ": token ids must be in [0, 2^32); got " + std::to_string(id) +
                                    ". Leave padding and ignored labels out");
    unsigned char word[4];
    store_le(word, static_cast<std::uint32_t>(id));
    bytes->insert(bytes->end(), word, word + 4);
  }
}

}  // namespace

void record_keys(const IdLists& prompts, const IdLists& completions, unsigned char* keys) {
  check_offsets(prompts, "prompt");
  check_offsets(completions, "completion");
  if (prompts.offsets.size() != completions.offsets.size())
    bad(StoreCode::kBadValue, "there must be as many prompts as completions; got " +
                                  std::to_string(prompts.offsets.size() - 1) + " and " +
                                  std::to_string(completions.offsets.size() - 1));
  std::vector<unsigned char> bytes;
  for (std::size_t i = 0; i + 1 < prompts.offsets.size(); ++i) {
    if (completions.offsets[i] == completions.offsets[i + 1])
      bad(StoreCode::kEmptyCompletion,
          "completion " + std::to_string(i) +
              " has no tokens, so it has no log-prob. Drop rows whose completion is empty (or lost "
              "to truncation)");
    bytes.resize(8);
    store_le(bytes.data(), static_cast<std::uint64_t>(prompts.offsets[i + 1] - prompts.offsets[i]));
    put_ids(&bytes, prompts, i, "prompt");
    put_ids(&bytes, completions, i, "completion");
    const Digest key = blake2b_128(bytes.data(), bytes.size());
    std::memcpy(keys + 16 * i, key.data(), key.size());
  }
}

}  // namespace fusedpo
