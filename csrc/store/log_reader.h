// Reads logs: which bytes were promised, whether they are still what was written, and the records.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "store/error.h"
#include "store/file.h"
#include "store/format.h"

namespace fusedpo {

// Bytes of a file at any offset, through a buffer; for sequential reading.
class BufferedReader {
 public:
  explicit BufferedReader(const ReadableFile& file)
      : file_(file), buffer_(std::min<std::uint64_t>(std::size_t{1} << 18, file.size())) {}
  // `size` bytes at `offset`, valid until the next call; null when the file ends before.
  const unsigned char* at(std::uint64_t offset, std::size_t size);

 private:
  const ReadableFile& file_;
  std::vector<unsigned char> buffer_;
  std::uint64_t begin_ = 0;
  std::size_t filled_ = 0;
};

// The bytes of a mapping as a file: needs no descriptor, and outlives the removal of the file.
// Releases the mapping's memory now and then, so that reading on takes little of it.
class MappedFile final : public ReadableFile {
 public:
  explicit MappedFile(const Mapping& mapping) : mapping_(mapping) {}
  std::size_t read_at(std::uint64_t offset, void* to, std::size_t size) const override;
  std::uint64_t size() const override { return mapping_.bytes().size(); }

 private:
  const Mapping& mapping_;
  mutable std::uint64_t unreleased_ = 0;  // bytes read since the last release
};

// Walks the cells of [begin, end) of a log, which must be a promised range.
class LogCursor {
 public:
  enum class Frame { kEnd, kRecord, kMarker, kBad };

  // With `check_tokens` also the token values and the checksum of every range between markers are
  // checked; without, token values are skipped over.
  LogCursor(const ReadableFile& file, std::uint64_t begin, std::uint64_t end, bool check_tokens)
      : reader_(file), position_(begin), end_(end), check_tokens_(check_tokens) {}

  // After kBad the walk goes on with the next cell: call again to find what is still readable.
  Frame next();

  Record record;               // after kRecord
  Marker marker;               // after kMarker
  std::uint64_t offset = 0;    // of the frame
  const char* what = nullptr;  // after kBad

 private:
  Frame bad(const char* why);
  Frame read_marker(const unsigned char* cell);
  bool tokens_hold();

  BufferedReader reader_;
  std::uint64_t position_, end_;
  bool check_tokens_;
  std::uint32_t range_crc_ = 0;
  bool range_known_ = true;  // false after a bad frame: it was reported, its range need not be
};

struct Finding {
  std::uint64_t offset = 0;
  std::string what;
};

// What the header and the last marker tell. Reading it does not depend on the size of the log.
struct LogHead {
  std::uint64_t log_id = 0;
  std::uint64_t committed = 0;  // end of the promised bytes; 0 when nothing was ever promised
  std::uint64_t size = 0;
  bool closed = false;
  bool header_damaged = false;
  std::optional<Finding> discardable;  // bytes that were never promised
  // One copy of the last marker is not what was written; the other one keeps the promise. All of
  // its bytes are right or zero: `torn`, which a crash can do, too. Others have been changed.
  std::optional<Finding> bad_copy;
  bool bad_copy_torn = false;
};

struct LogScan {
  std::uint64_t records = 0;       // promised and readable
  std::vector<Finding> damage;     // of promised bytes, in order of their offsets; at most 1000
  std::uint64_t damage_count = 0;  // all of them
};

// Throws kBadMagic, kFutureVersion, kForeignEndianness or kIdentity for a log that is none of this
// store's.
LogHead read_log_head(const ReadableFile& file, const std::string& path, const Digest& identity);

// Reads the promised bytes from `begin` on, 0 or the `committed` of an earlier head of the same
// log, and calls `on_record(record, offset)` for every record.
LogScan scan_log(const ReadableFile& file, const LogHead& head, std::uint64_t begin,
                 const std::function<void(const Record&, std::uint64_t)>& on_record);

// The values of the record whose cell is at `offset`, from the bytes of the log. Throws kDamaged.
void read_log_tokens(std::span<const unsigned char> log, const std::string& path,
                     std::uint64_t offset, const Record& record, float* values);

}  // namespace fusedpo
