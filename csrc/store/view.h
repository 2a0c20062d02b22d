// What a reader sees of a store: snapshots, mapped, and an index of the logs that are not merged
// yet. Fixed once it is made; refreshing makes another one.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "store/directory.h"
#include "store/error.h"
#include "store/file.h"
#include "store/log_reader.h"
#include "store/snapshot.h"

namespace fusedpo {

// Safe for use by many threads at once. Making one reads the first and the last bytes of the files
// only. The first use reads the logs and takes memory of its own: 32 bytes for every record in a
// log. Everything else are pages of the files, shared with all processes that read them.
class View {
 public:
  // Reuses what `previous` (may be null) has read. Throws kMissing when a listed file is gone.
  // Damage is kept, and thrown by the first use, so that verify() can be called.
  View(FileSystem& files, const std::string& directory, const StoreIdentity& identity,
       const StoreFiles& listing, const std::shared_ptr<const View>& previous);

  // For each of n keys (16 bytes each) its record, or num_tokens = 0 where there is none. Several
  // values within the tolerance: the one that a merge would keep. Throws kContradiction, kDamaged.
  void lookup(const unsigned char* keys, std::size_t n, Record* records) const;
  // The token values of records that lookup() gave for these keys, one after another.
  void lookup_tokens(const unsigned char* keys, const Record* records, std::size_t n,
                     float* values) const;

  std::uint64_t size() const;  // distinct keys

  struct Log {
    std::string name;
    LogHead head;
    std::unique_ptr<Mapping> mapping;  // null when nothing was promised
  };
  const std::vector<std::shared_ptr<const Log>>& logs() const { return logs_; }
  const std::vector<std::shared_ptr<const Snapshot>>& snapshots() const { return snapshots_; }
  std::uint64_t records_in_log(std::size_t log) const { return index().records[log]; }

 private:
  struct Entry {
    Key key;
    std::uint32_t log = 0;
    std::uint64_t offset = 0;
    bool operator<(const Entry& other) const { return key < other.key; }
  };
  struct Index {
    std::vector<Entry> entries;          // of all logs, sorted by key
    std::vector<std::uint64_t> records;  // of each log
    std::optional<StoreError> damage;
  };
  struct Place {  // of a value: a snapshot's row or a log's offset
    const Snapshot* snapshot = nullptr;
    const Log* log = nullptr;
    std::uint64_t position = 0;
  };

  const Index& index() const;  // made when it is first needed
  void make_index() const;
  const Index& sound_index() const;  // throws the damage that was found
  template <class OnValue>
  void each_value(const unsigned char* keys, std::size_t n, OnValue&& on_value) const;
  Record log_record(const Entry& entry) const;

  std::string directory_;
  double tolerance_;
  std::vector<std::shared_ptr<const Snapshot>> snapshots_;
  std::vector<std::shared_ptr<const Log>> logs_;
  std::optional<StoreError> damage_;  // of snapshots

  mutable std::mutex index_mutex_;
  mutable std::atomic<bool> indexed_ = false;
  mutable Index index_;
  mutable std::shared_ptr<const View> base_;  // an indexed view to start from, until indexed
};

}  // namespace fusedpo
