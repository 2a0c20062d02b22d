#include "store/view.h"

#include <algorithm>
#include <map>
#include <unordered_map>
#include <utility>

#include "store/key_search.h"
#include "store/sorted_records.h"

namespace fusedpo {
namespace {

std::string first_damage(const std::string& path, const LogScan& scan) {
  return path + ", offset " + std::to_string(scan.damage.front().offset) + ": " +
         scan.damage.front().what + " (" + std::to_string(scan.damage_count) +
         " such places in this file). The bytes were confirmed by a sync and have changed since. "
         "Restore the file, or remove it and score what it held again; verify lists all damage";
}

}  // namespace

View::View(FileSystem& files, const std::string& directory, const StoreIdentity& identity,
           const StoreFiles& listing, const std::shared_ptr<const View>& previous)
    : directory_(directory), tolerance_(identity.tolerance) {
  for (const std::string& name : listing.snapshots) {
    const std::string path = join(directory, name);
    std::shared_ptr<const Snapshot> known;
    if (previous != nullptr)  // equal names have equal content
      for (const auto& snapshot : previous->snapshots_)
        if (snapshot->path() == path) known = snapshot;
    try {
      snapshots_.push_back(known ? known : std::make_shared<Snapshot>(files, path, identity));
    } catch (const StoreError& e) {
      if (e.code != StoreCode::kDamaged) throw;
      if (!damage_) damage_ = e;
    }
  }
  for (const std::string& name : listing.logs) {
    const std::string path = join(directory, name);
    const auto log = std::make_shared<Log>();
    log->name = name;
    log->head = read_log_head(*files.open(path), path, identity.digest);
    if (log->head.committed > 0) log->mapping = files.map(path);
    logs_.push_back(log);
  }
  if (previous == nullptr) return;
  const std::lock_guard lock(previous->index_mutex_);
  base_ = previous->indexed_ ? previous : previous->base_;
}

const View::Index& View::index() const {
  if (!indexed_) {
    const std::lock_guard lock(index_mutex_);
    if (!indexed_) make_index();
  }
  return index_;
}

const View::Index& View::sound_index() const {
  if (damage_) throw *damage_;
  const Index& found = index();
  if (found.damage) throw *found.damage;
  return found;
}

void View::make_index() const {
  Index made;
  std::vector<Entry> fresh;
  // A log that the base has read already is read on from there, under its new number here.
  constexpr std::uint32_t kGone = ~std::uint32_t{0};
  std::vector<std::uint32_t> number;
  std::map<std::string, std::size_t> base_logs;
  if (base_ != nullptr) {
    number.assign(base_->logs_.size(), kGone);
    for (std::size_t i = 0; i < base_->logs_.size(); ++i) base_logs[base_->logs_[i]->name] = i;
  }
  for (std::uint32_t i = 0; i < logs_.size(); ++i) {
    const Log& log = *logs_[i];
    std::uint64_t begin = 0, records = 0;
    const auto known = base_logs.find(log.name);
    if (known != base_logs.end() && !base_->index_.damage) {
      const LogHead& old = base_->logs_[known->second]->head;
      // The same file, not another one that has taken its name.
      if (old.log_id == log.head.log_id && old.committed <= log.head.committed) {
        begin = old.committed;
        records = base_->index_.records[known->second];
        number[known->second] = i;
      }
    }
    LogScan scan;
    if (log.mapping != nullptr) {
      scan = scan_log(MappedFile(*log.mapping), log.head, begin,
                      [&](const Record& record, std::uint64_t offset) {
                        fresh.push_back({record.key, i, offset});
                      });
      log.mapping->release_memory();
    }
    made.records.push_back(records + scan.records);
    if (scan.damage_count > 0 && !made.damage) {
      const std::string path = join(directory_, log.name);
      made.damage = StoreError(StoreCode::kDamaged, path, scan.damage.front().offset,
                               first_damage(path, scan));
    }
  }
  std::sort(fresh.begin(), fresh.end());
  if (base_ != nullptr) {
    for (Entry entry : base_->index_.entries) {
      if (number[entry.log] == kGone) continue;
      entry.log = number[entry.log];
      made.entries.push_back(entry);
    }
  }
  if (made.entries.empty()) {
    made.entries = std::move(fresh);
  } else {
    const auto middle = static_cast<std::ptrdiff_t>(made.entries.size());
    made.entries.insert(made.entries.end(), fresh.begin(), fresh.end());
    std::inplace_merge(made.entries.begin(), made.entries.begin() + middle, made.entries.end());
  }
  index_ = std::move(made);
  base_ = nullptr;
  indexed_ = true;
}

Record View::log_record(const Entry& entry) const {
  const Log& log = *logs_[entry.log];
  const auto bytes = log.mapping->bytes();
  Record record;
  if (entry.offset + kCell > bytes.size() || !record.decode(bytes.data() + entry.offset) ||
      record.key != entry.key)
    throw StoreError(StoreCode::kDamaged, join(directory_, log.name), entry.offset,
                     join(directory_, log.name) + ", offset " + std::to_string(entry.offset) +
                         ": the record changed while the store was open. Run verify");
  return record;
}

// Calls on_value(j, record, place) for every value of key j.
template <class OnValue>
void View::each_value(const unsigned char* keys, std::size_t n, OnValue&& on_value) const {
  const std::vector<Entry>& entries = sound_index().entries;
  constexpr std::size_t kBatch = 256;
  std::int64_t rows[kBatch];
  for (const auto& snapshot : snapshots_) {
    for (std::size_t begin = 0; begin < n; begin += kBatch) {
      const std::size_t count = std::min(kBatch, n - begin);
      snapshot->find(keys + 16 * begin, count, rows);
      for (std::size_t j = 0; j < count; ++j) {
        if (rows[j] < 0) continue;
        const auto row = static_cast<std::uint64_t>(rows[j]);
        on_value(begin + j, snapshot->at(row), Place{snapshot.get(), nullptr, row});
      }
    }
  }
  if (entries.empty()) return;
  struct Sorted {
    const Entry* first;
    Key operator()(std::uint64_t i) const { return first[i].key; }
    void prefetch(std::uint64_t i) const { __builtin_prefetch(first + i); }
  };
  const auto target = [keys](std::size_t j) { return Key::load(keys + 16 * j); };
  lower_bounds(Sorted{entries.data()}, entries.size(), target, n,
               [&](std::size_t j, std::uint64_t i) {
                 for (; i < entries.size() && entries[i].key == target(j); ++i) {
                   const Log* log = logs_[entries[i].log].get();
                   on_value(j, log_record(entries[i]), Place{nullptr, log, entries[i].offset});
                 }
               });
}

void View::lookup(const unsigned char* keys, std::size_t n, Record* records) const {
  std::fill(records, records + n, Record{});
  // The least and the largest log-prob of keys that have different ones; the best may be neither.
  std::unordered_map<std::size_t, std::pair<double, double>> extremes;
  each_value(keys, n, [&](std::size_t j, const Record& value, const Place& place) {
    Record& best = records[j];
    if (best.num_tokens == 0) {
      best = value;
      return;
    }
    double low = best.logp, high = best.logp;
    if (value.logp != best.logp) {
      auto& known = extremes.try_emplace(j, best.logp, best.logp).first->second;
      low = known.first = std::min(known.first, value.logp);
      high = known.second = std::max(known.second, value.logp);
    }
    if (value.num_tokens != best.num_tokens || !agree(low, high, tolerance_))
      throw StoreError(
          StoreCode::kContradiction,
          place.log ? join(directory_, place.log->name) : place.snapshot->path(), place.position,
          "one key has two values that differ by more than the tolerance: log-probs " +
              std::to_string(low) + " and " + std::to_string(high) + ", " +
              std::to_string(best.num_tokens) + " and " + std::to_string(value.num_tokens) +
              " tokens. verify lists all such keys");
    if (std::make_pair(!value.has_tokens, value.logp) < std::make_pair(!best.has_tokens, best.logp))
      best = value;
  });
}

void View::lookup_tokens(const unsigned char* keys, const Record* records, std::size_t n,
                         float* values) const {
  std::vector<std::size_t> begins(n + 1, 0);
  for (std::size_t j = 0; j < n; ++j)
    begins[j + 1] = begins[j] + (records[j].has_tokens ? records[j].num_tokens : 0);
  std::vector<bool> done(n, false);
  std::vector<float> candidate;
  each_value(keys, n, [&](std::size_t j, const Record& value, const Place& place) {
    if (!value.has_tokens || !records[j].has_tokens || value.logp != records[j].logp) return;
    candidate.resize(value.num_tokens);
    if (place.snapshot != nullptr)
      place.snapshot->read_tokens(place.position, value, candidate.data());
    else
      read_log_tokens(place.log->mapping->bytes(), join(directory_, place.log->name),
                      place.position, value, candidate.data());
    // Of equal sums the smaller values, as a merge decides.
    float* best = values + begins[j];
    if (!done[j] || std::lexicographical_compare(candidate.begin(), candidate.end(), best,
                                                 best + value.num_tokens))
      std::copy(candidate.begin(), candidate.end(), best);
    done[j] = true;
  });
}

std::uint64_t View::size() const {
  const std::vector<Entry>& entries = sound_index().entries;
  std::uint64_t count = 0;
  std::vector<unsigned char> keys;
  std::vector<std::int64_t> rows;
  // Counts the keys that none of the first `known` snapshots has.
  const auto count_new = [&](std::size_t known) {
    const std::size_t n = keys.size() / 16;
    std::vector<bool> seen(n, false);
    rows.resize(n);
    for (std::size_t s = 0; s < known; ++s) {
      snapshots_[s]->find(keys.data(), n, rows.data());
      for (std::size_t j = 0; j < n; ++j) seen[j] = seen[j] || rows[j] >= 0;
    }
    count += static_cast<std::uint64_t>(std::count(seen.begin(), seen.end(), false));
    keys.clear();
  };
  constexpr std::size_t kBatch = 16 * 4096;
  for (std::size_t s = 0; s < snapshots_.size(); ++s) {
    if (s == 0) {
      count += snapshots_[0]->size();
      continue;
    }
    for (std::uint64_t i = 0; i < snapshots_[s]->size(); ++i) {
      keys.insert(keys.end(), snapshots_[s]->keys() + 16 * i, snapshots_[s]->keys() + 16 * i + 16);
      if (keys.size() >= kBatch) count_new(s);
    }
    count_new(s);
  }
  for (std::size_t i = 0; i < entries.size(); ++i) {
    if (i > 0 && entries[i].key == entries[i - 1].key) continue;
    unsigned char raw[16];
    entries[i].key.store(raw);
    keys.insert(keys.end(), raw, raw + 16);
    if (keys.size() >= kBatch) count_new(snapshots_.size());
  }
  count_new(snapshots_.size());
  return count;
}

}  // namespace fusedpo
