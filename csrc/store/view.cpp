#include "store/view.h"

#include <algorithm>
#include <map>

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
           const StoreFiles& listing, const View* previous)
    : directory_(directory), tolerance_(identity.tolerance) {
  for (const std::string& name : listing.snapshots) {
    const std::string path = join(directory, name);
    const auto known = [&](const std::shared_ptr<const Snapshot>& s) { return s->path() == path; };
    if (previous != nullptr) {
      // Equal names have equal content.
      const auto& old = previous->snapshots_;
      const auto it = std::find_if(old.begin(), old.end(), known);
      if (it != old.end()) {
        snapshots_.push_back(*it);
        continue;
      }
    }
    try {
      snapshots_.push_back(std::make_shared<Snapshot>(files, path, identity));
    } catch (const StoreError& e) {
      if (e.code != StoreCode::kDamaged) throw;
      keep_damage(e);
    }
  }
  for (const std::string& name : listing.logs) read_log(files, name, identity, previous);
  index(previous);
}

void View::keep_damage(const StoreError& error) {
  if (!damage_) damage_ = error;
}

void View::throw_damage() const {
  if (damage_) throw *damage_;
}

void View::read_log(FileSystem& files, const std::string& name, const StoreIdentity& identity,
                    const View* previous) {
  const std::string path = join(directory_, name);
  std::shared_ptr<const Log> old;
  if (previous != nullptr)
    for (const auto& log : previous->logs_)
      if (log->name == name) old = log;
  const auto number = static_cast<std::uint32_t>(logs_.size());
  const auto log = std::make_shared<Log>();
  log->name = name;
  const auto file = files.open(path);
  const std::size_t fresh = fresh_.size();
  log->scan = scan_log(*file, path, identity.digest, old ? old->scan.committed : 0,
                       [&](const Record& record, std::uint64_t offset) {
                         fresh_.push_back({record.key, number, offset});
                       });
  if (log->scan.damage_count > 0) {
    fresh_.resize(fresh);
    keep_damage(StoreError(StoreCode::kDamaged, path, log->scan.damage.front().offset,
                           first_damage(path, log->scan)));
  }
  if (old && log->scan.damage_count == 0) {
    log->scan.records += old->scan.records;
    if (log->scan.committed == old->scan.committed) {
      logs_.push_back(old);
      return;
    }
  }
  if (log->scan.committed > 0) log->mapping = files.map(path);
  logs_.push_back(log);
}

void View::index(const View* previous) {
  std::sort(fresh_.begin(), fresh_.end());
  if (previous != nullptr) {
    // The old entries of logs that are still there, under the logs' new numbers; still sorted.
    std::map<std::string, std::uint32_t> numbers;
    for (std::uint32_t i = 0; i < logs_.size(); ++i)
      if (logs_[i]->mapping != nullptr) numbers[logs_[i]->name] = i;
    for (Entry entry : previous->entries_) {
      const auto it = numbers.find(previous->logs_[entry.log]->name);
      if (it == numbers.end()) continue;
      entry.log = it->second;
      entries_.push_back(entry);
    }
  }
  const auto middle = static_cast<std::ptrdiff_t>(entries_.size());
  entries_.insert(entries_.end(), fresh_.begin(), fresh_.end());
  std::inplace_merge(entries_.begin(), entries_.begin() + middle, entries_.end());
  std::vector<Entry>().swap(fresh_);
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
  throw_damage();
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
  if (entries_.empty()) return;
  struct Sorted {
    const Entry* entries;
    Key operator()(std::uint64_t i) const { return entries[i].key; }
    void prefetch(std::uint64_t i) const { __builtin_prefetch(entries + i); }
  };
  const auto target = [keys](std::size_t j) { return Key::load(keys + 16 * j); };
  lower_bounds(Sorted{entries_.data()}, entries_.size(), target, n,
               [&](std::size_t j, std::uint64_t i) {
                 for (; i < entries_.size() && entries_[i].key == target(j); ++i) {
                   const Log* log = logs_[entries_[i].log].get();
                   on_value(j, log_record(entries_[i]), Place{nullptr, log, entries_[i].offset});
                 }
               });
}

void View::lookup(const unsigned char* keys, std::size_t n, Record* records) const {
  std::fill(records, records + n, Record{});
  each_value(keys, n, [&](std::size_t j, const Record& value, const Place& place) {
    Record& best = records[j];
    if (best.num_tokens == 0) {
      best = value;
      return;
    }
    if (value.num_tokens != best.num_tokens || !agree(value.logp, best.logp, tolerance_))
      throw StoreError(
          StoreCode::kContradiction,
          place.log ? join(directory_, place.log->name) : place.snapshot->path(), place.position,
          "one key has two values that differ by more than the tolerance: log-probs " +
              std::to_string(best.logp) + " and " + std::to_string(value.logp) + ", " +
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
  throw_damage();
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
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (i > 0 && entries_[i].key == entries_[i - 1].key) continue;
    unsigned char raw[16];
    entries_[i].key.store(raw);
    keys.insert(keys.end(), raw, raw + 16);
    if (keys.size() >= kBatch) count_new(snapshots_.size());
  }
  count_new(snapshots_.size());
  return count;
}

}  // namespace fusedpo
