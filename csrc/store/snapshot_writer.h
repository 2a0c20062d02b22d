// Writes a snapshot: records in the order of their keys go to their columns, then the file gets its
// header, becomes durable, and only then its name.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "store/blake2b.h"
#include "store/file.h"
#include "store/snapshot.h"

namespace fusedpo {

class SnapshotWriter {
 public:
  // No more records and token values than these may be added; fewer cost moving the columns once.
  SnapshotWriter(FileSystem& files, std::string directory, const StoreIdentity& identity,
                 std::uint64_t max_records, std::uint64_t max_token_values);
  // Removes the temporary file of a snapshot that was not finished.
  ~SnapshotWriter();
  SnapshotWriter(const SnapshotWriter&) = delete;
  SnapshotWriter& operator=(const SnapshotWriter&) = delete;

  // `tokens` is null, or holds record.num_tokens values.
  void add(const Record& record, const float* tokens);

  // Makes the file durable under its final name, which it returns.
  std::string finish();

  std::uint64_t records() const { return records_; }
  std::uint64_t token_values() const { return token_values_; }

 private:
  struct Column {
    std::uint64_t begin = 0, written = 0;
    std::vector<unsigned char> buffer;
    Blake2b hash{16};
  };
  enum { kKeys, kLogps, kTokenOffsets, kNumTokens, kCrcs, kTokenCrcs, kTokens, kColumns };

  static std::array<std::uint64_t, kColumns> begins(const SnapshotLayout& layout);
  void put(int column, const void* data, std::size_t size);
  void flush(Column& column);
  void move(const Column& column, std::uint64_t to);

  FileSystem& files_;
  const std::string directory_;
  const StoreIdentity identity_;
  const SnapshotLayout planned_;
  std::string temporary_;
  std::unique_ptr<WritableFile> file_;
  std::array<Column, kColumns> columns_;  // in the order of the file
  std::uint64_t records_ = 0, token_values_ = 0;
  bool finished_ = false;
};

}  // namespace fusedpo
