// What a reader sees of a store: snapshots, mapped, and an index of the logs that are not merged
// yet. Fixed once it is made; refreshing makes another one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "store/directory.h"
#include "store/error.h"
#include "store/file.h"
#include "store/log_reader.h"
#include "store/snapshot.h"

namespace fusedpo {

// Safe for use by many threads at once. Memory of its own: 32 bytes for every record in a log; the
// pages of the files are shared with all processes that read them.
class View {
 public:
  // Reuses what `previous` (may be null) has read. Throws kMissing when a listed file is gone.
  // Damage is kept, and thrown by the first use, so that verify() can be called.
  View(FileSystem& files, const std::string& directory, const StoreIdentity& identity,
       const StoreFiles& listing, const View* previous);

  // For each of n keys (16 bytes each) its record, or num_tokens = 0 where there is none. Several
  // values within the tolerance: the one that a merge would keep. Throws kContradiction, kDamaged.
  void lookup(const unsigned char* keys, std::size_t n, Record* records) const;
  // The token values of records that lookup() gave for these keys, one after another.
  void lookup_tokens(const unsigned char* keys, const Record* records, std::size_t n,
                     float* values) const;

  std::uint64_t size() const;  // distinct keys
  void throw_damage() const;

  struct Log {
    std::string name;
    std::unique_ptr<Mapping> mapping;  // null when nothing was promised
    LogScan scan;
  };
  const std::vector<std::shared_ptr<const Log>>& logs() const { return logs_; }
  const std::vector<std::shared_ptr<const Snapshot>>& snapshots() const { return snapshots_; }

 private:
  struct Entry {
    Key key;
    std::uint32_t log = 0;
    std::uint64_t offset = 0;
    bool operator<(const Entry& other) const { return key < other.key; }
  };
  struct Place {  // of a value: a snapshot's row or a log's offset
    const Snapshot* snapshot = nullptr;
    const Log* log = nullptr;
    std::uint64_t position = 0;
  };

  void read_log(FileSystem& files, const std::string& name, const StoreIdentity& identity,
                const View* previous);
  void index(const View* previous);
  template <class OnValue>
  void each_value(const unsigned char* keys, std::size_t n, OnValue&& on_value) const;
  Record log_record(const Entry& entry) const;
  void keep_damage(const StoreError& error);

  std::string directory_;
  double tolerance_;
  std::vector<std::shared_ptr<const Snapshot>> snapshots_;
  std::vector<std::shared_ptr<const Log>> logs_;
  std::vector<Entry> entries_;  // of all logs, sorted by key
  std::vector<Entry> fresh_;    // while the view is made: what `previous` has not
  std::optional<StoreError> damage_;
  std::uint64_t damage_count_ = 0;
};

}  // namespace fusedpo
