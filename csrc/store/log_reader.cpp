#include "store/log_reader.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace fusedpo {
namespace {

constexpr std::size_t kMaxFindings = 1000;
constexpr std::uint64_t kTokenChunk = std::uint64_t{1} << 16;

bool all_zero(const unsigned char* p, std::size_t n) {
  return std::all_of(p, p + n, [](unsigned char byte) { return byte == 0; });
}

// The last marker of the file, if there is any: the end of what was promised. Without a trusted
// header (`log_id` unknown) any marker that names its own position counts.
std::optional<Marker> last_marker(const ReadableFile& file, std::uint64_t size,
                                  std::optional<std::uint64_t> log_id) {
  constexpr std::uint64_t kChunk = std::uint64_t{1} << 18;
  std::vector<unsigned char> chunk(std::min(kChunk, size));
  std::uint64_t end = size / kCell * kCell;
  while (end > kLogHeader) {
    const std::uint64_t begin = std::max<std::uint64_t>(kLogHeader, end - std::min(end, kChunk));
    const std::size_t got = file.read_at(begin, chunk.data(), end - begin);
    for (std::size_t i = got / kCell; i-- > 0;) {
      Marker marker;
      const std::uint64_t at = begin + i * kCell;
      if (!marker.decode(chunk.data() + i * kCell)) continue;
      if (log_id && marker.log_id != *log_id) continue;
      if (marker.offset == at || marker.offset + kCell == at) return marker;
    }
    end = begin;
  }
  return std::nullopt;
}

// Sets head->bad_copy where one copy of the last marker differs from the other.
void compare_copies(const ReadableFile& file, const Marker& last, LogHead* head) {
  std::array<unsigned char, kCell> right;
  last.encode(right.data());
  std::array<unsigned char, kMarkerPair> pair{};
  const std::size_t size = file.read_at(last.offset, pair.data(), pair.size());
  for (std::size_t copy = 0; copy + kCell <= size; copy += kCell) {
    const unsigned char* found = pair.data() + copy;
    if (std::equal(right.begin(), right.end(), found)) continue;
    head->bad_copy = Finding{last.offset + copy, "one copy of the last commit marker is damaged"};
    head->bad_copy_torn =
        std::equal(right.begin(), right.end(), found,
                   [](unsigned char a, unsigned char b) { return b == a || b == 0; });
  }
}

// Why these 64 bytes are not the header of a log of this store, or nothing.
std::optional<StoreError> header_problem(const unsigned char* bytes, const std::string& path,
                                         const Digest& identity) {
  const auto problem = [&](StoreCode code, std::uint64_t offset, const std::string& message) {
    return StoreError(code, path, offset, path + ": " + message);
  };
  if (std::memcmp(bytes, kLogMagic, sizeof kLogMagic) != 0)
    return problem(StoreCode::kBadMagic, 0,
                   "a log must begin with \"fdpo.log\", this file does not. Move it elsewhere");
  const auto order = load_le<std::uint32_t>(bytes + 8);
  if (order == reverse_bytes(kByteOrder))
    return problem(StoreCode::kForeignEndianness, 8,
                   "written in big-endian byte order; the format is little-endian. Score again");
  const bool intact = load_le<std::uint32_t>(bytes + 60) == masked_crc(bytes, 60);
  const auto version = load_le<std::uint32_t>(bytes + 12);
  if (intact && order == kByteOrder && version > kFormatVersion)
    return problem(StoreCode::kFutureVersion, 12,
                   "format version " + std::to_string(version) + "; this fusedpo knows version " +
                       std::to_string(kFormatVersion) + ". Upgrade fusedpo");
  if (!intact || order != kByteOrder || version != kFormatVersion)
    return problem(StoreCode::kDamaged, 0,
                   "the header is damaged, so its records cannot be trusted. Restore the file, or "
                   "remove it and score what it held again");
  if (std::memcmp(bytes + 16, identity.data(), identity.size()) != 0)
    return problem(StoreCode::kIdentity, 16,
                   "this log was written for another identity than identity.json tells. Move it "
                   "to the store it belongs to");
  return std::nullopt;
}

}  // namespace

const unsigned char* BufferedReader::at(std::uint64_t offset, std::size_t size) {
  if (offset < begin_ || offset + size > begin_ + filled_) {
    if (size > buffer_.size()) buffer_.resize(size);
    filled_ = file_.read_at(offset, buffer_.data(), buffer_.size());
    begin_ = offset;
    if (filled_ < size) return nullptr;
  }
  return buffer_.data() + (offset - begin_);
}

std::size_t MappedFile::read_at(std::uint64_t offset, void* to, std::size_t size) const {
  constexpr std::uint64_t kReleaseEvery = std::uint64_t{1} << 25;
  const auto bytes = mapping_.bytes();
  if (offset >= bytes.size()) return 0;
  const std::size_t n = std::min<std::uint64_t>(size, bytes.size() - offset);
  std::memcpy(to, bytes.data() + offset, n);
  unreleased_ += n;
  if (unreleased_ >= kReleaseEvery) {
    mapping_.release_memory();
    unreleased_ = 0;
  }
  return n;
}

LogCursor::Frame LogCursor::bad(const char* why) {
  what = why;
  position_ = offset + kCell;
  range_known_ = false;
  return Frame::kBad;
}

bool LogCursor::tokens_hold() {
  std::uint64_t at = offset + kCell;
  const std::uint64_t values_end = at + std::uint64_t{4} * record.num_tokens;
  const std::uint64_t end = at + token_bytes(record.num_tokens);
  std::array<unsigned char, 16> raw;
  record.key.store(raw.data());
  std::uint32_t crc = crc32c(raw.data(), raw.size());
  while (at < values_end) {
    const std::size_t n = std::min<std::uint64_t>(kTokenChunk, values_end - at);
    const unsigned char* p = reader_.at(at, n);
    if (p == nullptr) return false;
    crc = crc32c(p, n, crc);
    range_crc_ = crc32c(p, n, range_crc_);
    at += n;
  }
  const std::size_t rest = end - at;
  const unsigned char* p = reader_.at(at, rest);
  if (p == nullptr) return false;
  range_crc_ = crc32c(p, rest, range_crc_);
  return load_le<std::uint32_t>(p) == mask_crc32c(crc) && all_zero(p + 4, rest - 4);
}

LogCursor::Frame LogCursor::read_marker(const unsigned char* cell) {
  const bool first = marker.decode(cell) && marker.offset == offset;
  const unsigned char* pair = reader_.at(offset, kMarkerPair);
  Marker copy;
  const bool second = pair != nullptr && copy.decode(pair + kCell) && copy.offset == offset;
  if (!first && !second) return bad("a commit marker is damaged");
  if (!first) marker = copy;
  const bool range_holds =
      !check_tokens_ || !range_known_ || marker.range_crc == mask_crc32c(range_crc_);
  position_ = offset + kMarkerPair;
  range_crc_ = 0;
  range_known_ = true;
  // One copy of the last pair may be torn: LogHead::bad_copy tells, and nothing below suffers.
  if (first != second && position_ < end_) {
    what = "one copy of a commit marker is damaged";
    return Frame::kBad;
  }
  if (!range_holds) {
    what = "the checksum of the records before this commit marker does not hold";
    return Frame::kBad;
  }
  return Frame::kMarker;
}

LogCursor::Frame LogCursor::next() {
  if (position_ >= end_) return Frame::kEnd;
  offset = position_;
  const unsigned char* cell = reader_.at(offset, kCell);
  if (cell == nullptr) {
    position_ = end_;
    what = "the file ends early";
    return Frame::kBad;
  }
  if (Marker::is_marker(cell)) return read_marker(cell);
  if (!record.decode(cell)) {
    // The second copy of a marker tells that this cell is a damaged first one.
    Marker copy;
    const unsigned char* pair = reader_.at(offset, kMarkerPair);
    if (pair != nullptr && copy.decode(pair + kCell) && copy.offset == offset)
      return read_marker(pair);
    return bad("a record's checksum does not hold");
  }
  if (check_tokens_) range_crc_ = crc32c(cell, kCell, range_crc_);
  const std::uint64_t size = kCell + (record.has_tokens ? token_bytes(record.num_tokens) : 0);
  if (size > end_ - offset) return bad("a record's token values do not fit before the marker");
  if (check_tokens_ && record.has_tokens && !tokens_hold())
    return bad("the checksum of a record's token values does not hold");
  position_ = offset + size;
  return Frame::kRecord;
}

LogHead read_log_head(const ReadableFile& file, const std::string& path, const Digest& identity) {
  LogHead head;
  head.size = file.size();
  std::array<unsigned char, kLogHeader> header{};
  const bool whole = file.read_at(0, header.data(), header.size()) == header.size();
  const auto problem = header_problem(header.data(), path, identity);
  const bool readable = whole && !problem;
  if (readable) head.log_id = load_le<std::uint64_t>(header.data() + 32);
  const auto last =
      last_marker(file, head.size, readable ? std::optional(head.log_id) : std::nullopt);
  if (problem) {
    // Before the first marker the header was not promised either: a writer died creating the log.
    const bool torn =
        !whole || problem->code == StoreCode::kDamaged || all_zero(header.data(), header.size());
    if ((last || !torn) && problem->code != StoreCode::kDamaged) throw *problem;
    head.header_damaged = last.has_value();
  }
  if (!last) {
    if (head.size > 0 && (problem || head.size > kLogHeader))
      head.discardable = Finding{problem ? 0 : kLogHeader, "never confirmed by a sync"};
    return head;
  }
  head.closed = last->closed;
  head.committed = last->offset + kMarkerPair;
  compare_copies(file, *last, &head);
  if (head.size > head.committed)
    head.discardable = Finding{head.committed, "never confirmed by a sync"};
  else if (head.size < head.committed)
    head.discardable = Finding{last->offset + kCell, "second copy of a marker not written"};
  return head;
}

LogScan scan_log(const ReadableFile& file, const LogHead& head, std::uint64_t begin,
                 const std::function<void(const Record&, std::uint64_t)>& on_record) {
  LogScan scan;
  const auto damage = [&scan](std::uint64_t offset, const char* what) {
    ++scan.damage_count;
    if (scan.damage.size() < kMaxFindings) scan.damage.push_back({offset, what});
  };
  if (head.header_damaged) {
    damage(0, "the header is damaged");
    return scan;
  }
  LogCursor cursor(file, std::max<std::uint64_t>(begin, kLogHeader), head.committed, true);
  for (;;) {
    switch (cursor.next()) {
      case LogCursor::Frame::kEnd:
        return scan;
      case LogCursor::Frame::kRecord:
        ++scan.records;
        on_record(cursor.record, cursor.offset);
        break;
      case LogCursor::Frame::kMarker:
        break;
      case LogCursor::Frame::kBad:
        damage(cursor.offset, cursor.what);
        break;
    }
  }
}

void read_log_tokens(std::span<const unsigned char> log, const std::string& path,
                     std::uint64_t offset, const Record& record, float* values) {
  const std::uint64_t begin = offset + kCell;
  const std::uint64_t bytes = std::uint64_t{4} * record.num_tokens;
  if (begin + bytes + 4 > log.size() || load_le<std::uint32_t>(log.data() + begin + bytes) !=
                                            token_crc(record.key, log.data() + begin, bytes))
    throw StoreError(StoreCode::kDamaged, path, begin,
                     path + ": the checksum of a record's token values does not hold. Run verify");
  for (std::uint32_t t = 0; t < record.num_tokens; ++t)
    values[t] = load_le<float>(log.data() + begin + std::size_t{4} * t);
}

}  // namespace fusedpo
