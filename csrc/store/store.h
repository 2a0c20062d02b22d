// A reference store: a directory with an identity, logs and snapshots. docs/store_format.md.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "store/file.h"
#include "store/log_writer.h"
#include "store/merge.h"
#include "store/snapshot.h"
#include "store/verify.h"
#include "store/view.h"

namespace fusedpo {

// Safe for use by many threads and, opened by each, by many processes at once.
class Store {
 public:
  // Reads what is durable now.
  Store(FileSystem& files, std::string directory, StoreIdentity identity);

  const StoreIdentity& identity() const { return identity_; }

  // What readers of this object see, until refresh() replaces it.
  std::shared_ptr<const View> view() const;
  // Reads what became durable since.
  void refresh();

  std::unique_ptr<LogWriter> writer(const std::string& name) const;
  // Merges, then refreshes.
  MergeReport merge(const MergeOptions& options);
  // All records that are durable now, in the order of their keys.
  std::unique_ptr<SortedRecords> sorted(std::uint64_t memory_bytes) const;

 private:
  FileSystem& files_;
  const std::string directory_;
  const StoreIdentity identity_;
  mutable std::mutex mutex_;  // guards view_
  std::mutex refresh_mutex_;  // one refresh at a time
  std::shared_ptr<const View> view_;
};

}  // namespace fusedpo
