// All records of a store in the order of their keys, one for each key, in bounded memory and
// without temporary files: logs are read several times, a range of keys at a time.
//
// Keys are hashes, so the next range is guessed from the number of records; where the guess was too
// wide, the range is narrowed while it is read. Snapshots are sorted already and are merged in.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "store/file.h"
#include "store/log_reader.h"
#include "store/snapshot.h"

namespace fusedpo {

// Mapped, not open: a store may have more logs than a process may have open files.
struct LogSource {
  std::string path;
  std::unique_ptr<Mapping> mapping;
  std::uint64_t committed = 0;
  std::uint64_t records = 0;
};

// One value for a key, and where it stands: a log's offset or a snapshot's row.
struct Item {
  Record record;
  std::uint32_t source = 0;  // logs first, then snapshots
  std::uint64_t position = 0;
};

// Whether two log-probs of one key (sums, or values of one token) may be taken for the same number:
// |a - b| <= tolerance * max(kAgreeFloor, |a|, |b|). The floor is there because a log-prob near 0
// is the difference of two numbers as large as the logits, and carries their rounding.
constexpr double kAgreeFloor = 32;
bool agree(double a, double b, double tolerance);

class SortedRecords {
 public:
  enum class Damage { kThrow, kSkip };
  // Called with a message that holds both values; the first value is then given by next().
  using OnContradiction = std::function<void(const std::string& message, const Item& item)>;

  // Without `on_contradiction` a contradiction is thrown as StoreError.
  SortedRecords(std::vector<LogSource> logs, std::vector<std::unique_ptr<Snapshot>> snapshots,
                double tolerance, Damage damage, std::uint64_t memory_bytes,
                OnContradiction on_contradiction = nullptr);

  // The next key's record: with token values before without, then the smaller log-prob, then the
  // smaller token values. A function of the set of values, not of the files they came from.
  bool next(Item* item);
  std::vector<float> tokens(const Item& item) const;
  const std::string& path_of(const Item& item) const;

 private:
  void fill();
  void add(const Item& item);
  void compact();
  void drop_identical();
  bool same_tokens(const Item& a, const Item& b) const;
  bool snapshot_item(std::size_t s, Item* item);
  Item resolve(std::vector<Item>& group);
  void contradiction(const Item& a, const Item& b, const std::string& detail);

  std::vector<LogSource> logs_;
  std::vector<std::unique_ptr<Snapshot>> snapshots_;
  std::vector<std::uint64_t> rows_;  // next row of each snapshot
  const double tolerance_;
  const Damage damage_;
  OnContradiction on_contradiction_;
  std::size_t capacity_;

  std::vector<Item> items_;  // the current range, sorted
  std::size_t at_ = 0;
  Key upper_{};             // the current range ends here, inclusive
  bool started_ = false;    // whether there was a range at all
  bool logs_done_ = false;  // the current range is the last
  bool guess_badly_ = false;
  std::uint64_t remaining_ = 0;  // log records not given yet, duplicates included
  std::vector<Item> group_;
  mutable std::uint64_t token_reads_ = 0;  // of logs
};

}  // namespace fusedpo
