#include "store/sorted_records.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <tuple>

namespace fusedpo {
namespace {

constexpr Key kLastKey{~std::uint64_t{0}, ~std::uint64_t{0}};

// The order among values of one key, up to their token values.
auto rank(const Item& item) {
  return std::make_tuple(!item.record.has_tokens, item.record.logp, item.record.num_tokens);
}

bool before(const Item& a, const Item& b) {
  if (a.record.key != b.record.key) return a.record.key < b.record.key;
  if (rank(a) != rank(b)) return rank(a) < rank(b);
  return std::tie(a.source, a.position) < std::tie(b.source, b.position);
}

std::string number(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

}  // namespace

bool agree(double a, double b, double tolerance) {
  return std::abs(a - b) <= tolerance * std::max({kAgreeFloor, std::abs(a), std::abs(b)});
}

SortedRecords::SortedRecords(std::vector<LogSource> logs,
                             std::vector<std::unique_ptr<Snapshot>> snapshots, double tolerance,
                             Damage damage, std::uint64_t memory_bytes,
                             OnContradiction on_contradiction)
    : logs_(std::move(logs)),
      snapshots_(std::move(snapshots)),
      rows_(snapshots_.size(), 0),
      tolerance_(tolerance),
      damage_(damage),
      on_contradiction_(std::move(on_contradiction)),
      capacity_(std::max<std::size_t>(16, memory_bytes / sizeof(Item))) {
  for (const LogSource& log : logs_) remaining_ += log.records;
  logs_done_ = remaining_ == 0;
}

const std::string& SortedRecords::path_of(const Item& item) const {
  return item.source < logs_.size() ? logs_[item.source].path
                                    : snapshots_[item.source - logs_.size()]->path();
}

std::vector<float> SortedRecords::tokens(const Item& item) const {
  if (!item.record.has_tokens) return {};
  std::vector<float> values(item.record.num_tokens);
  if (item.source >= logs_.size()) {
    snapshots_[item.source - logs_.size()]->read_tokens(item.position, item.record, values.data());
    return values;
  }
  // Each read makes some neighbouring pages resident, too; all logs together keep about 128 MiB.
  constexpr std::uint64_t kReleaseEvery = 2048;
  if (++token_reads_ % kReleaseEvery == 0)
    for (const LogSource& log : logs_) log.mapping->release_memory();
  const LogSource& log = logs_[item.source];
  read_log_tokens(log.mapping->bytes(), log.path, item.position, item.record, values.data());
  return values;
}

bool SortedRecords::same_tokens(const Item& a, const Item& b) const {
  return !a.record.has_tokens || tokens(a) == tokens(b);
}

// Removes items that equal their predecessor in everything: replayed work, the common duplicate.
void SortedRecords::drop_identical() {
  const auto identical = [this](const Item& a, const Item& b) {
    return a.record.key == b.record.key && rank(a) == rank(b) && same_tokens(a, b);
  };
  items_.erase(std::unique(items_.begin(), items_.end(), identical), items_.end());
}

void SortedRecords::compact() {
  std::sort(items_.begin(), items_.end(), before);
  drop_identical();
  if (items_.size() <= capacity_ / 2) return;
  // Keep the lower half, up to a whole key; all that is above comes in a later pass.
  upper_ = items_[capacity_ / 2].record.key;
  logs_done_ = false;
  const auto end =
      std::upper_bound(items_.begin(), items_.end(), upper_,
                       [](const Key& key, const Item& item) { return key < item.record.key; });
  items_.erase(end, items_.end());
  // One key with very many different values must fit all the same.
  capacity_ = std::max(capacity_, 2 * items_.size());
}

void SortedRecords::add(const Item& item) {
  if (items_.size() >= capacity_) compact();
  if (item.record.key <= upper_) items_.push_back(item);
}

void SortedRecords::fill() {
  const Key lower = upper_;
  const bool from_start = !started_;
  started_ = true;
  items_.clear();
  items_.reserve(std::min<std::uint64_t>(capacity_, remaining_));
  at_ = 0;
  upper_ = kLastKey;
  logs_done_ = true;
  if (remaining_ > capacity_ && !guess_badly_) {
    const double share = 0.9 * static_cast<double>(capacity_) / static_cast<double>(remaining_);
    const double rest = static_cast<double>(kLastKey.high - lower.high) * share;
    upper_ = {lower.high + static_cast<std::uint64_t>(rest), kLastKey.low};
    logs_done_ = false;
  }
  std::uint64_t seen = 0;
  for (std::size_t s = 0; s < logs_.size(); ++s) {
    // What is skipped where it is damaged must be checked here; else the scan has checked it.
    const MappedFile file(*logs_[s].mapping);
    LogCursor cursor(file, kLogHeader, logs_[s].committed, damage_ == Damage::kSkip);
    for (;;) {
      const LogCursor::Frame frame = cursor.next();
      if (frame == LogCursor::Frame::kEnd) break;
      if (frame == LogCursor::Frame::kBad && damage_ == Damage::kThrow)
        throw StoreError(StoreCode::kDamaged, logs_[s].path, cursor.offset,
                         logs_[s].path + ", offset " + std::to_string(cursor.offset) + ": " +
                             cursor.what + ". Run verify");
      if (frame != LogCursor::Frame::kRecord) continue;
      if (!from_start && cursor.record.key <= lower) continue;
      if (cursor.record.key > upper_) continue;
      ++seen;
      add({cursor.record, static_cast<std::uint32_t>(s), cursor.offset});
    }
    logs_[s].mapping->release_memory();
  }
  std::sort(items_.begin(), items_.end(), before);
  guess_badly_ = !logs_done_ && seen < capacity_ / 4;  // keys that are no hashes
  remaining_ -= std::min<std::uint64_t>(remaining_, items_.size());
}

// The current row of snapshot s, or false at its end.
bool SortedRecords::snapshot_item(std::size_t s, Item* item) {
  const Snapshot& snapshot = *snapshots_[s];
  constexpr std::uint64_t kReleaseEvery = std::uint64_t{1} << 18;
  for (std::uint64_t& row = rows_[s]; row < snapshot.size(); ++row) {
    if (row % kReleaseEvery == 0) snapshot.release_memory();
    item->source = static_cast<std::uint32_t>(logs_.size() + s);
    item->position = row;
    if (damage_ == Damage::kThrow) {
      item->record = snapshot.at(row);
      if (row > 0 && item->record.key <= snapshot.key(row - 1))
        throw StoreError(StoreCode::kDamaged, snapshot.path(), snapshot.layout().keys + 16 * row,
                         snapshot.path() + ": keys out of order at record " + std::to_string(row) +
                             ". Run verify");
      return true;
    }
    if (!snapshot.read(row, &item->record)) continue;
    if (snapshot.token_problem(row, item->record) != nullptr) item->record.has_tokens = false;
    return true;
  }
  return false;
}

void SortedRecords::contradiction(const Item& a, const Item& b, const std::string& detail) {
  unsigned char raw[16];
  a.record.key.store(raw);
  std::string key;
  for (const unsigned char byte : raw) {
    constexpr char kDigits[] = "0123456789abcdef";
    key += kDigits[byte >> 4];
    key += kDigits[byte & 15];
  }
  const std::string message = "key " + key +
                              " has two values that differ by more than the "
                              "tolerance " +
                              number(tolerance_) + ": " + detail + " (" + path_of(a) + " and " +
                              path_of(b) +
                              "). Remove the log whose values are wrong, or make a store with a "
                              "larger tolerance";
  if (on_contradiction_ == nullptr)
    throw StoreError(StoreCode::kContradiction, path_of(b), std::nullopt, message);
  on_contradiction_(message, b);
}

Item SortedRecords::resolve(std::vector<Item>& group) {
  if (group.size() == 1) return group.front();
  std::sort(group.begin(), group.end(), before);
  Item winner = group.front();
  const auto [low, high] = std::minmax_element(
      group.begin(), group.end(),
      [](const Item& a, const Item& b) { return a.record.logp < b.record.logp; });
  if (!agree(low->record.logp, high->record.logp, tolerance_)) {
    contradiction(*low, *high,
                  "log-probs " + number(low->record.logp) + " and " + number(high->record.logp));
    return winner;
  }
  for (const Item& item : group) {
    if (item.record.num_tokens != winner.record.num_tokens) {
      contradiction(winner, item,
                    std::to_string(winner.record.num_tokens) + " and " +
                        std::to_string(item.record.num_tokens) + " tokens");
      return winner;
    }
  }
  if (!winner.record.has_tokens) return winner;
  std::vector<float> best = tokens(winner);
  for (const Item& item : group) {
    if (!item.record.has_tokens) continue;
    std::vector<float> values = tokens(item);
    for (std::size_t t = 0; t < values.size(); ++t) {
      if (agree(values[t], best[t], tolerance_)) continue;
      contradiction(winner, item,
                    "token log-probs " + number(best[t]) + " and " + number(values[t]) +
                        " at position " + std::to_string(t));
      return winner;
    }
    if (rank(item) == rank(winner) && values < best) {
      winner = item;
      best = std::move(values);
    }
  }
  return winner;
}

bool SortedRecords::next(Item* item) {
  for (;;) {
    bool any = at_ < items_.size();
    Key least = any ? items_[at_].record.key : kLastKey;
    Item candidate;
    for (std::size_t s = 0; s < snapshots_.size(); ++s) {
      if (!snapshot_item(s, &candidate)) continue;
      if (!any || candidate.record.key < least) least = candidate.record.key;
      any = true;
    }
    if (!logs_done_ && at_ == items_.size() && (!any || !started_ || least > upper_)) {
      fill();
      continue;
    }
    if (!any) return false;
    group_.clear();
    for (; at_ < items_.size() && items_[at_].record.key == least; ++at_)
      group_.push_back(items_[at_]);
    for (std::size_t s = 0; s < snapshots_.size(); ++s) {
      if (!snapshot_item(s, &candidate) || candidate.record.key != least) continue;
      group_.push_back(candidate);
      ++rows_[s];
    }
    *item = resolve(group_);
    return true;
  }
}

}  // namespace fusedpo
