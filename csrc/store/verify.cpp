#include "store/verify.h"

#include <memory>
#include <utility>

#include "store/blake2b.h"
#include "store/directory.h"
#include "store/error.h"
#include "store/log_reader.h"
#include "store/sorted_records.h"

namespace fusedpo {
namespace {

class Verifier {
 public:
  Verifier(FileSystem& files, const std::string& directory, const StoreIdentity& identity,
           std::uint64_t limit)
      : files_(files), directory_(directory), identity_(identity), limit_(limit) {}

  void read(const StoreFiles& listing) {
    report_ = {};
    logs_.clear();
    snapshots_.clear();
    for (const std::string& name : listing.logs) read_log(name);
    for (const std::string& name : listing.snapshots) read_snapshot(name);
    for (const std::string& name : listing.temporaries)
      report_.notes.push_back({name, std::nullopt,
                               "temporary file of a merge that runs or was interrupted; "
                               "merge with abandoned=True removes it"});
  }

  VerifyReport count_and_compare(std::uint64_t memory_bytes) {
    SortedRecords sorted(std::move(logs_), std::move(snapshots_), identity_.tolerance,
                         SortedRecords::Damage::kSkip, memory_bytes,
                         [&](const std::string& message, const Item& item) {
                           problem(base_name(sorted_->path_of(item)), item.position, message);
                         });
    sorted_ = &sorted;
    Item item;
    while (sorted.next(&item)) ++report_.records;
    return std::move(report_);
  }

 private:
  static std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

  void problem(const std::string& file, std::optional<std::uint64_t> offset,
               const std::string& what) {
    ++report_.problem_count;
    if (report_.problems.size() < limit_) report_.problems.push_back({file, offset, what});
  }

  void read_log(const std::string& name) {
    const std::string path = join(directory_, name);
    const auto file = files_.open(path);
    FileReport summary{name, "log", file->size(), 0, false};
    try {
      const LogHead head = read_log_head(*file, path, identity_.digest);
      const LogScan scan = scan_log(*file, head, 0, [](const Record&, std::uint64_t) {});
      for (const Finding& finding : scan.damage) problem(name, finding.offset, finding.what);
      report_.problem_count += scan.damage_count - scan.damage.size();
      if (head.discardable)
        report_.notes.push_back({name, head.discardable->offset, head.discardable->what});
      if (head.bad_copy) report_bad_copy(name, head);
      summary.records = scan.records;
      summary.closed = head.closed;
      if (scan.records > 0) logs_.push_back({path, files_.map(path), head.committed, scan.records});
    } catch (const StoreError& e) {
      if (e.code == StoreCode::kMissing) throw;
      problem(name, e.offset, e.what());
    }
    report_.files.push_back(std::move(summary));
  }

  void report_bad_copy(const std::string& name, const LogHead& head) {
    const auto& [offset, what] = *head.bad_copy;
    const std::string nothing_lost = what + "; the other copy keeps what it confirmed";
    if (head.closed && !head.bad_copy_torn)
      problem(name, offset, nothing_lost + ". The file has changed since: merge the store soon");
    else
      report_.notes.push_back({name, offset, nothing_lost});
  }

  void read_snapshot(const std::string& name) {
    const std::string path = join(directory_, name);
    FileReport summary{name, "snapshot", files_.open(path)->size(), 0, true};
    try {
      auto snapshot = std::make_unique<Snapshot>(files_, path, identity_);
      check_records(name, *snapshot);
      check_name(name, *snapshot);
      summary.records = snapshot->size();
      snapshots_.push_back(std::move(snapshot));
    } catch (const StoreError& e) {
      if (e.code == StoreCode::kMissing) throw;
      problem(name, e.offset, e.what());
    }
    report_.files.push_back(std::move(summary));
  }

  void check_records(const std::string& name, const Snapshot& snapshot) {
    const SnapshotLayout& layout = snapshot.layout();
    std::uint64_t token_values = 0;
    Key previous;
    for (std::uint64_t i = 0; i < snapshot.size(); ++i) {
      if (i % (std::uint64_t{1} << 18) == 0) snapshot.release_memory();
      Record record;
      const std::uint64_t at = layout.keys + 16 * i;
      const std::string which = "record " + std::to_string(i) + ": ";
      if (!snapshot.read(i, &record)) {
        problem(name, at, which + "the checksum does not hold");
        continue;
      }
      if (const char* what = snapshot.token_problem(i, record))
        problem(name, layout.token_offsets + 8 * i, which + what);
      if (i > 0 && record.key <= previous) problem(name, at, which + "keys are out of order");
      previous = record.key;
      if (record.has_tokens) token_values += record.num_tokens;
    }
    if (token_values != layout.token_values && report_.problem_count == 0)
      problem(name, layout.token_offsets,
              "the header promises " + std::to_string(layout.token_values) +
                  " token values; the records have " + std::to_string(token_values));
  }

  // The name is a hash of the content: what the single checksums cannot see, such as a record that
  // is missing, shows here.
  void check_name(const std::string& name, const Snapshot& snapshot) {
    const SnapshotLayout& layout = snapshot.layout();
    std::vector<std::pair<std::uint64_t, std::uint64_t>> columns = {
        {layout.keys, 16 * layout.records}, {layout.logps, 8 * layout.records}};
    if (layout.token_values > 0)
      columns.emplace_back(layout.token_offsets, 8 * (layout.records + 1));
    columns.emplace_back(layout.num_tokens, 4 * layout.records);
    columns.emplace_back(layout.crcs, 4 * layout.records);
    if (layout.token_values > 0) {
      columns.emplace_back(layout.token_crcs, 4 * layout.records);
      columns.emplace_back(layout.tokens, 4 * layout.token_values);
    }
    std::vector<Digest> digests;
    for (const auto& [begin, size] : columns) {
      Blake2b hash(16);
      constexpr std::uint64_t kChunk = std::uint64_t{1} << 25;
      for (std::uint64_t at = 0; at < size; at += kChunk) {
        hash.update(snapshot.bytes().data() + begin + at, std::min(kChunk, size - at));
        snapshot.release_memory();
      }
      hash.finish(digests.emplace_back().data());
    }
    const std::string expected = snapshot_name(layout.header, digests);
    if (name != expected)
      problem(name, std::nullopt,
              "the content's hash gives the name " + expected +
                  ": the content has changed, or the file was renamed");
  }

  FileSystem& files_;
  const std::string& directory_;
  const StoreIdentity& identity_;
  const std::uint64_t limit_;
  VerifyReport report_;
  std::vector<LogSource> logs_;
  std::vector<std::unique_ptr<Snapshot>> snapshots_;
  const SortedRecords* sorted_ = nullptr;
};

}  // namespace

VerifyReport verify_store(FileSystem& files, const std::string& directory,
                          const StoreIdentity& identity, std::uint64_t limit,
                          std::uint64_t memory_bytes) {
  Verifier verifier(files, directory, identity, limit);
  with_stable_listing(files, directory, [&](const StoreFiles& listing) { verifier.read(listing); });
  return verifier.count_and_compare(memory_bytes);
}

}  // namespace fusedpo
