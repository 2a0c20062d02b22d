// Appends records to a log of its own: one writer, one file, no locks.
//
// What is promised: a record is durable once the sync() or close() after its append() has returned.
// A sync is two disk syncs: the records first, then a commit marker. So a marker on disk proves
// that everything below it reached the disk before: a bad byte there is damage, never a torn write.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "store/file.h"
#include "store/format.h"

namespace fusedpo {

// N records as columns. `tokens` is empty, or holds the values of all records one after another.
struct RecordBatch {
  std::span<const unsigned char> keys;  // 16 N bytes
  std::span<const double> logps;
  std::span<const std::uint32_t> num_tokens;
  std::span<const float> tokens;
  bool has_tokens = false;
};

// Safe for use by several threads. A process forked from the writer's must not use it.
class LogWriter {
 public:
  // Creates no file before the first append. `name` becomes part of the file's name.
  LogWriter(FileSystem& files, std::string directory, std::string name, const Digest& identity,
            std::uint64_t log_id);
  // Does not sync: what close() or sync() has not confirmed may be lost.
  ~LogWriter() = default;

  // Checks the whole batch first: either all of it is taken or, with an error, none.
  void append(const RecordBatch& batch);
  void sync();
  // Syncs and marks the log as complete, so that a merge may remove it. Further calls do nothing.
  void close();

  std::string path() const;  // empty before the first append
  std::uint64_t records() const;

 private:
  void check_usable();
  void create();
  void put(const void* data, std::size_t size);
  void flush();
  void commit(bool closed);

  // Runs a step after which the file is in an unknown state if it throws.
  template <class Step>
  void or_break(Step&& step);

  FileSystem& files_;
  const std::string directory_, name_;
  const Digest identity_;
  const std::uint64_t log_id_;
  const long owner_;  // process id
  mutable std::mutex mutex_;
  std::unique_ptr<WritableFile> file_;
  std::string path_;
  std::vector<unsigned char> buffer_;
  std::uint64_t offset_ = 0;  // where the next byte goes, the buffer included
  std::uint64_t records_ = 0;
  std::uint32_t range_crc_ = 0;
  bool dirty_ = false;  // something was appended since the last marker
  bool closed_ = false;
  bool broken_ = false;  // nothing can be written any more
  std::string why_broken_;
};

// Throws kBadValue or kEmptyCompletion for the first record that cannot be stored.
void check_batch(const RecordBatch& batch);

}  // namespace fusedpo
