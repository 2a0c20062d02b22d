#include "store/log_writer.h"

#include <unistd.h>

#include <array>
#include <cmath>
#include <exception>
#include <utility>

#include "store/error.h"

namespace fusedpo {
namespace {

constexpr std::size_t kBufferBytes = std::size_t{1} << 20;

[[noreturn]] void bad_value(StoreCode code, std::size_t row, const std::string& message) {
  throw StoreError(code, "", std::nullopt, "record " + std::to_string(row) + ": " + message);
}

}  // namespace

void check_batch(const RecordBatch& batch) {
  const std::size_t n = batch.logps.size();
  if (batch.keys.size() != 16 * n || batch.num_tokens.size() != n)
    throw StoreError(StoreCode::kBadValue, "", std::nullopt,
                     "keys, logps and num_tokens must have the same length; got " +
                         std::to_string(batch.keys.size() / 16) + ", " + std::to_string(n) +
                         " and " + std::to_string(batch.num_tokens.size()));
  std::uint64_t tokens = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (batch.num_tokens[i] == 0)
      bad_value(StoreCode::kEmptyCompletion, i,
                "num_tokens is 0, but only a completion with tokens has a log-prob. Drop rows "
                "whose completion is empty (or lost to truncation) before scoring");
    if (batch.num_tokens[i] > kMaxTokens)
      bad_value(StoreCode::kBadValue, i, "num_tokens must be below 2^31");
    if (!std::isfinite(batch.logps[i]) || batch.logps[i] > 0)
      bad_value(StoreCode::kBadValue, i,
                "a log-prob must be finite and at most 0; got " + std::to_string(batch.logps[i]) +
                    ". Was the model's output NaN, or a loss stored instead?");
    tokens += batch.num_tokens[i];
  }
  if (!batch.has_tokens) return;
  if (batch.tokens.size() != tokens)
    throw StoreError(StoreCode::kBadValue, "", std::nullopt,
                     "token_logps must hold num_tokens values for every record, " +
                         std::to_string(tokens) + " in all; got " +
                         std::to_string(batch.tokens.size()));
  std::size_t at = 0;
  for (std::size_t i = 0; i < n; ++i) {
    for (std::uint32_t t = 0; t < batch.num_tokens[i]; ++t, ++at) {
      const float value = batch.tokens[at];
      if (!std::isfinite(value) || value > 0)
        bad_value(StoreCode::kBadValue, i,
                  "token log-prob " + std::to_string(t) + " must be finite and at most 0; got " +
                      std::to_string(value));
    }
  }
}

LogWriter::LogWriter(FileSystem& files, std::string directory, std::string name,
                     const Digest& identity, std::uint64_t log_id)
    : files_(files),
      directory_(std::move(directory)),
      name_(std::move(name)),
      identity_(identity),
      log_id_(log_id),
      owner_(::getpid()) {}

template <class Step>
void LogWriter::or_break(Step&& step) {
  broken_ = true;  // until the step is done, whatever it throws: bytes and checksum may disagree
  try {
    step();
  } catch (const std::exception& e) {
    file_ = nullptr;
    why_broken_ = e.what();
    throw;
  }
  broken_ = false;
}

void LogWriter::check_usable() {
  if (owner_ != ::getpid())
    throw StoreError(StoreCode::kClosed, path_, std::nullopt,
                     "this writer belongs to the process that opened it; after a fork the child "
                     "must open a writer of its own");
  if (broken_)
    throw StoreError(StoreCode::kClosed, path_, std::nullopt,
                     "this writer failed before (" + why_broken_ +
                         "). What its last successful sync() confirmed is kept; open a new writer "
                         "and append the rest again");
}

void LogWriter::create() {
  path_ = join(directory_, name_ + "-" + hex(log_id_) + ".fdlog");
  file_ = files_.create(path_);
  if (file_ == nullptr)
    throw StoreError(StoreCode::kIo, path_, std::nullopt,
                     path_ + " exists already; every writer needs a file of its own. Run again");
  std::array<unsigned char, kLogHeader> header;
  LogHeader{identity_, log_id_}.encode(header.data());
  file_->append(header.data(), header.size());
  file_->sync();
  files_.sync_directory(directory_);
  offset_ = kLogHeader;
}

void LogWriter::flush() {
  if (!buffer_.empty()) file_->append(buffer_.data(), buffer_.size());
  buffer_.clear();
}

void LogWriter::put(const void* data, std::size_t size) {
  const auto* p = static_cast<const unsigned char*>(data);
  range_crc_ = crc32c(p, size, range_crc_);
  offset_ += size;
  if (buffer_.size() + size > kBufferBytes) flush();
  if (size >= kBufferBytes)
    file_->append(p, size);
  else
    buffer_.insert(buffer_.end(), p, p + size);
}

void LogWriter::append(const RecordBatch& batch) {
  const std::lock_guard lock(mutex_);
  check_usable();
  if (closed_)
    throw StoreError(StoreCode::kClosed, path_, std::nullopt,
                     "the writer is closed; open a new one with store.writer()");
  check_batch(batch);
  if (batch.logps.empty()) return;
  or_break([&] {
    if (file_ == nullptr) create();
    std::array<unsigned char, kCell> cell;
    std::vector<unsigned char> values;
    std::size_t at = 0;
    for (std::size_t i = 0; i < batch.logps.size(); ++i) {
      // -0.0 becomes 0.0: equal values have equal bytes.
      const Record record{Key::load(batch.keys.data() + 16 * i), batch.logps[i] + 0.0,
                          batch.num_tokens[i], batch.has_tokens};
      record.encode(cell.data());
      put(cell.data(), cell.size());
      if (!batch.has_tokens) continue;
      values.assign(token_bytes(record.num_tokens), 0);
      const std::size_t bytes = std::size_t{4} * record.num_tokens;
      for (std::uint32_t t = 0; t < record.num_tokens; ++t, ++at)
        store_le(values.data() + std::size_t{4} * t, batch.tokens[at] + 0.0f);
      store_le(values.data() + bytes, token_crc(record.key, values.data(), bytes));
      put(values.data(), values.size());
    }
  });
  records_ += batch.logps.size();
  dirty_ = true;
}

void LogWriter::commit(bool closed) {
  or_break([&] {
    flush();
    if (dirty_) file_->sync();
    std::array<unsigned char, kMarkerPair> pair;
    const Marker marker{offset_, closed, log_id_, mask_crc32c(range_crc_)};
    marker.encode(pair.data());
    marker.encode(pair.data() + kCell);
    file_->append(pair.data(), pair.size());
    file_->sync();
    offset_ += pair.size();
    range_crc_ = 0;
    dirty_ = false;
    // A merge of abandoned logs renames a log before it reads it. If the name still holds now,
    // that merge will read this marker, too.
    if (!file_->is_at(path_))
      throw StoreError(StoreCode::kTaken, path_, std::nullopt,
                       path_ +
                           " was taken over by a merge of abandoned logs (or removed) while "
                           "its writer was alive. What sync() confirmed before is kept; open a "
                           "new writer and append the rest again");
  });
}

void LogWriter::sync() {
  const std::lock_guard lock(mutex_);
  check_usable();
  if (!closed_ && dirty_) commit(false);
}

void LogWriter::close() {
  const std::lock_guard lock(mutex_);
  if (closed_) return;
  check_usable();
  if (file_ != nullptr) commit(true);
  closed_ = true;
  file_ = nullptr;
}

std::string LogWriter::path() const {
  const std::lock_guard lock(mutex_);
  return path_;
}

std::uint64_t LogWriter::records() const {
  const std::lock_guard lock(mutex_);
  return records_;
}

}  // namespace fusedpo
