#include "store/merge.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "store/directory.h"
#include "store/error.h"
#include "store/log_reader.h"
#include "store/snapshot_writer.h"
#include "store/sorted_records.h"

namespace fusedpo {
namespace {

struct Inputs {
  std::vector<LogSource> logs;
  std::vector<std::unique_ptr<Snapshot>> snapshots;
  std::vector<std::string> removable;
  std::uint64_t records = 0, token_values = 0;
};

void take_over(FileSystem& files, const std::string& directory, std::string* name) {
  const std::string taken = taken_name(*name);
  files.rename(join(directory, *name), join(directory, taken));
  files.sync_directory(directory);
  *name = taken;
}

struct Scanned {
  LogHead head;
  LogScan scan;
  std::uint64_t token_values = 0;
};

Scanned scan_strictly(FileSystem& files, const std::string& path, const Digest& identity) {
  Scanned scanned;
  const auto file = files.open(path);
  scanned.head = read_log_head(*file, path, identity);
  scanned.scan = scan_log(*file, scanned.head, 0, [&](const Record& record, std::uint64_t) {
    if (record.has_tokens) scanned.token_values += record.num_tokens;
  });
  if (scanned.scan.damage_count > 0) {
    const Finding& first = scanned.scan.damage.front();
    throw StoreError(StoreCode::kDamaged, path, first.offset,
                     path + ", offset " + std::to_string(first.offset) + ": " + first.what +
                         ". Nothing was merged. Restore the file, or remove it and score what it "
                         "held again; verify lists all damage");
  }
  return scanned;
}

Inputs open_inputs(FileSystem& files, const std::string& directory, const StoreIdentity& identity,
                   const MergeOptions& options, const StoreFiles& listing, MergeReport* report) {
  Inputs inputs;
  *report = {};
  for (std::string name : listing.logs) {
    std::string path = join(directory, name);
    Scanned scanned = scan_strictly(files, path, identity.digest);
    if (options.abandoned && !scanned.head.closed && !is_taken(name)) {
      take_over(files, directory, &name);
      path = join(directory, name);
      // Opened again: a network file system then asks its server.
      scanned = scan_strictly(files, path, identity.digest);
    }
    const LogHead& head = scanned.head;
    inputs.records += scanned.scan.records;
    inputs.token_values += scanned.token_values;
    if (head.closed || is_taken(name)) {
      inputs.removable.push_back(name);
      if (head.discardable)
        report->discarded.push_back(name + ": the bytes from offset " +
                                    std::to_string(head.discardable->offset) + " on, " +
                                    head.discardable->what);
    } else {
      report->kept_logs.push_back(name);
    }
    inputs.logs.push_back({path, files.map(path), head.committed, scanned.scan.records});
  }
  for (const std::string& name : listing.snapshots) {
    inputs.snapshots.push_back(std::make_unique<Snapshot>(files, join(directory, name), identity));
    inputs.records += inputs.snapshots.back()->size();
    inputs.token_values += inputs.snapshots.back()->layout().token_values;
    inputs.removable.push_back(name);
  }
  return inputs;
}

}  // namespace

std::unique_ptr<SortedRecords> read_sorted(FileSystem& files, const std::string& directory,
                                           const StoreIdentity& identity,
                                           std::uint64_t memory_bytes) {
  Inputs inputs;
  MergeReport unused;
  with_stable_listing(files, directory, [&](const StoreFiles& listing) {
    inputs = open_inputs(files, directory, identity, MergeOptions{}, listing, &unused);
  });
  return std::make_unique<SortedRecords>(std::move(inputs.logs), std::move(inputs.snapshots),
                                         identity.tolerance, SortedRecords::Damage::kThrow,
                                         memory_bytes);
}

MergeReport merge_store(FileSystem& files, const std::string& directory,
                        const StoreIdentity& identity, const MergeOptions& options) {
  MergeReport report;
  Inputs inputs;
  std::vector<std::string> temporaries;
  with_stable_listing(files, directory, [&](const StoreFiles& listing) {
    inputs = open_inputs(files, directory, identity, options, listing, &report);
    temporaries = listing.temporaries;
  });
  if (options.keep && !report.kept_logs.empty())
    throw StoreError(StoreCode::kIo, join(directory, report.kept_logs.front()), std::nullopt,
                     join(directory, report.kept_logs.front()) +
                         " was not closed by its writer, so what it holds cannot be pruned. Close "
                         "the writer; or, when it is dead, merge with abandoned=True first");
  const bool logs_hold_records = std::any_of(inputs.logs.begin(), inputs.logs.end(),
                                             [](const LogSource& log) { return log.records > 0; });
  if (!options.keep && !logs_hold_records && inputs.snapshots.size() == 1) {
    report.snapshot = inputs.removable.back();
    report.records = inputs.snapshots.front()->size();
  } else if (inputs.records > 0) {
    SnapshotWriter writer(files, directory, identity, inputs.records, inputs.token_values);
    SortedRecords sorted(std::move(inputs.logs), std::move(inputs.snapshots), identity.tolerance,
                         SortedRecords::Damage::kThrow, options.memory_bytes);
    Item item;
    while (sorted.next(&item)) {
      if (options.keep && !options.keep(item.record.key)) continue;
      if (item.record.has_tokens)
        writer.add(item.record, sorted.tokens(item).data());
      else
        writer.add(item.record, nullptr);
    }
    report.records = writer.records();
    report.snapshot = writer.finish();
  }
  if (options.abandoned)
    inputs.removable.insert(inputs.removable.end(), temporaries.begin(), temporaries.end());
  for (const std::string& name : inputs.removable) {
    if (name == report.snapshot) continue;
    if (files.remove(join(directory, name))) report.removed.push_back(name);
  }
  if (!report.removed.empty()) files.sync_directory(directory);
  return report;
}

}  // namespace fusedpo
