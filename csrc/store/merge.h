// Merges all logs and snapshots of a store into one snapshot.
//
// Order of events, so that a crash at any point loses nothing: the new snapshot becomes durable
// under its final name; only then what it holds is removed. Running again after a crash gives the
// same bytes under the same name. Merges that run at the same time make snapshots of their own and
// remove only what they have read themselves.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "store/file.h"
#include "store/snapshot.h"
#include "store/sorted_records.h"

namespace fusedpo {

struct MergeOptions {
  // Also take over the logs that no writer has closed: renamed first, then read, so that a writer
  // that is alive after all fails its next sync instead of losing what that sync confirms.
  bool abandoned = false;
  // Keep only the keys for which this is true (prune). Needs all logs to be closed or `abandoned`.
  std::function<bool(const Key&)> keep;
  std::uint64_t memory_bytes = std::uint64_t{200} << 20;
};

struct MergeReport {
  std::string snapshot;  // name of the file; empty when the store holds nothing
  std::uint64_t records = 0;
  std::vector<std::string> removed;    // names of merged files
  std::vector<std::string> kept_logs;  // not closed: a writer may still be at work
  std::vector<std::string> discarded;  // bytes never confirmed by a sync, as sentences
};

// All records in the order of their keys, for an export. Writes nothing; throws kContradiction,
// kDamaged.
std::unique_ptr<SortedRecords> read_sorted(FileSystem& files, const std::string& directory,
                                           const StoreIdentity& identity,
                                           std::uint64_t memory_bytes);

MergeReport merge_store(FileSystem& files, const std::string& directory,
                        const StoreIdentity& identity, const MergeOptions& options);

}  // namespace fusedpo
