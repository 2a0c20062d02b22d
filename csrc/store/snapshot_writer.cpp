#include "store/snapshot_writer.h"

#include <algorithm>
#include <stdexcept>

#include "store/error.h"

namespace fusedpo {
namespace {

constexpr std::size_t kBufferBytes = std::size_t{1} << 20;

}  // namespace

SnapshotWriter::SnapshotWriter(FileSystem& files, std::string directory,
                               const StoreIdentity& identity, std::uint64_t max_records,
                               std::uint64_t max_token_values)
    : files_(files),
      directory_(std::move(directory)),
      identity_(identity),
      planned_(identity, max_records, max_token_values),
      temporary_(join(directory_, "merge-" + hex(random_id()) + ".tmp")),
      file_(files_.create(temporary_)) {
  if (file_ == nullptr)
    throw StoreError(StoreCode::kIo, temporary_, std::nullopt, temporary_ + " exists; run again");
  const auto begin = begins(planned_);
  for (std::size_t c = 0; c < kColumns; ++c) columns_[c].begin = begin[c];
}

SnapshotWriter::~SnapshotWriter() {
  if (finished_ || file_ == nullptr) return;
  try {
    files_.remove(temporary_);
  } catch (const StoreError&) {  // left over: verify tells
  }
}

std::array<std::uint64_t, SnapshotWriter::kColumns> SnapshotWriter::begins(
    const SnapshotLayout& layout) {
  return {layout.keys, layout.logps,      layout.token_offsets, layout.num_tokens,
          layout.crcs, layout.token_crcs, layout.tokens};
}

void SnapshotWriter::flush(Column& column) {
  if (column.buffer.empty()) return;
  file_->write_at(column.begin + column.written, column.buffer.data(), column.buffer.size());
  column.hash.update(column.buffer.data(), column.buffer.size());
  column.written += column.buffer.size();
  column.buffer.clear();
}

void SnapshotWriter::put(int index, const void* data, std::size_t size) {
  Column& column = columns_[static_cast<std::size_t>(index)];
  const auto* p = static_cast<const unsigned char*>(data);
  if (column.buffer.size() + size > kBufferBytes) flush(column);
  column.buffer.insert(column.buffer.end(), p, p + size);
}

void SnapshotWriter::add(const Record& record, const float* tokens) {
  const std::uint64_t count = tokens == nullptr ? 0 : record.num_tokens;
  if (records_ >= planned_.records || token_values_ + count > planned_.token_values)
    throw std::logic_error("more records than the snapshot was planned for");
  unsigned char cell[kCell];
  Record plain = record;
  plain.has_tokens = false;  // the snapshot tells it by its offsets
  plain.encode(cell);
  put(kKeys, cell, 16);
  put(kLogps, cell + 16, 8);
  put(kNumTokens, cell + 24, 4);
  put(kCrcs, cell + 28, 4);
  if (planned_.token_values > 0) {
    unsigned char word[8];
    store_le(word, token_values_);
    put(kTokenOffsets, word, 8);
    std::vector<unsigned char> values(4 * count);
    for (std::uint64_t t = 0; t < count; ++t) store_le(values.data() + 4 * t, tokens[t]);
    put(kTokens, values.data(), values.size());
    store_le(word, token_crc(record.key, values.data(), values.size()));
    put(kTokenCrcs, word, 4);
  }
  ++records_;
  token_values_ += count;
}

// Columns only ever move towards the start of the file, and the ones before have moved already.
void SnapshotWriter::move(const Column& column, std::uint64_t to) {
  if (to == column.begin) return;
  std::vector<unsigned char> chunk(std::min<std::uint64_t>(kBufferBytes, column.written));
  for (std::uint64_t at = 0; at < column.written; at += chunk.size()) {
    const std::size_t n = std::min<std::uint64_t>(chunk.size(), column.written - at);
    file_->read_at(column.begin + at, chunk.data(), n);
    file_->write_at(to + at, chunk.data(), n);
  }
}

std::string SnapshotWriter::finish() {
  if (planned_.token_values > 0) {
    unsigned char word[8];
    store_le(word, token_values_);
    put(kTokenOffsets, word, 8);
  }
  const SnapshotLayout layout(identity_, records_, token_values_);
  const auto begin = begins(layout);
  std::vector<Digest> digests;
  for (std::size_t c = 0; c < kColumns; ++c) {
    flush(columns_[c]);
    const bool of_tokens = c == kTokenOffsets || c == kTokenCrcs || c == kTokens;
    if (of_tokens && token_values_ == 0) continue;
    move(columns_[c], begin[c]);
    columns_[c].hash.finish(digests.emplace_back().data());
  }
  file_->truncate(layout.size);
  file_->write_at(0, layout.header.data(), layout.header.size());
  file_->sync();
  const std::string name = snapshot_name(layout.header, digests);
  files_.rename(temporary_, join(directory_, name));
  finished_ = true;
  files_.sync_directory(directory_);
  return name;
}

}  // namespace fusedpo
