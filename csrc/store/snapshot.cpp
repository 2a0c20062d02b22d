#include "store/snapshot.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <string_view>

#include "store/blake2b.h"
#include "store/key_search.h"

namespace fusedpo {
namespace {

constexpr std::string_view kBegin =
    R"({"__metadata__":{"format":"fusedpo reference store","version":")";
constexpr std::uint64_t kHeaderUnit = 4096;  // a page: every column starts well aligned

std::string hex_of(const Digest& digest) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const unsigned char byte : digest) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

std::string escape(const std::string& ascii) {
  std::string text;
  for (const char c : ascii) {
    if (c == '"' || c == '\\') text += '\\';
    text += c;
  }
  return text;
}

std::string shortest(double value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}

// The number after `"name":"` in the header, if it stands there.
std::optional<std::uint64_t> number_after(std::string_view header, std::string_view name) {
  const std::size_t at = header.find(name);
  if (at == std::string_view::npos) return std::nullopt;
  std::uint64_t value = 0;
  const char* begin = header.data() + at + name.size();
  const auto parsed = std::from_chars(begin, header.data() + header.size(), value);
  // Larger counts would overflow the layout, and no file is that large.
  if (parsed.ec != std::errc() || value >= std::uint64_t{1} << 48) return std::nullopt;
  return value;
}

}  // namespace

StoreIdentity make_identity(std::string json, double tolerance) {
  const Digest digest = blake2b_128(json.data(), json.size());
  return {std::move(json), digest, tolerance};
}

SnapshotLayout::SnapshotLayout(const StoreIdentity& identity, std::uint64_t records,
                               std::uint64_t token_values)
    : records(records), token_values(token_values) {
  header = std::string(kBegin) + std::to_string(kFormatVersion) + R"(","records":")" +
           std::to_string(records) + R"(","token_values":")" + std::to_string(token_values) +
           R"(","tolerance":")" + shortest(identity.tolerance) + R"(","identity_digest":")" +
           hex_of(identity.digest) + R"(","identity":")" + escape(identity.json) + "\"}";
  std::uint64_t end = 0;
  // Widest elements first, so that every column is aligned to its element.
  const auto column = [&](const char* name, const char* dtype, std::uint64_t rows,
                          const char* inner, std::uint64_t row_bytes) {
    const std::uint64_t begin = end;
    end += rows * row_bytes;
    header += std::string(",\"") + name + R"(":{"dtype":")" + dtype + R"(","shape":[)" +
              std::to_string(rows) + inner + R"(],"data_offsets":[)" + std::to_string(begin) + "," +
              std::to_string(end) + "]}";
    return begin;
  };
  keys = column("keys", "U8", records, ",16", 16);
  logps = column("logps", "F64", records, "", 8);
  if (token_values > 0) token_offsets = column("token_offsets", "U64", records + 1, "", 8);
  num_tokens = column("num_tokens", "U32", records, "", 4);
  crcs = column("crc32c", "U32", records, "", 4);
  if (token_values > 0) {
    token_crcs = column("token_crc32c", "U32", records, "", 4);
    tokens = column("token_logps", "F32", token_values, "", 4);
  }
  header += "}";
  header.append((kHeaderUnit - (header.size() + 8) % kHeaderUnit) % kHeaderUnit, ' ');
  unsigned char length[8];
  store_le(length, static_cast<std::uint64_t>(header.size()));
  header.insert(0, reinterpret_cast<const char*>(length), sizeof length);
  for (std::uint64_t* offset :
       {&keys, &logps, &num_tokens, &crcs, &token_offsets, &token_crcs, &tokens})
    *offset += header.size();
  size = header.size() + end;
}

Snapshot::Snapshot(FileSystem& files, const std::string& path, const StoreIdentity& identity)
    : path_(path), mapping_(files.map(path)), bytes_(mapping_->bytes()) {
  const auto problem = [&](StoreCode code, std::uint64_t offset, const std::string& message) {
    return StoreError(code, path, offset, path + ": " + message);
  };
  const std::uint64_t length = bytes_.size() < 8 ? 0 : load_le<std::uint64_t>(bytes_.data());
  if (length == 0 || length > bytes_.size() - 8 || (length + 8) % kHeaderUnit != 0)
    damaged(0, "the header's length does not fit the file");
  const std::string_view header(reinterpret_cast<const char*>(bytes_.data()) + 8, length);
  if (!header.starts_with(kBegin))
    throw problem(StoreCode::kBadMagic, 8,
                  "not a snapshot of a reference store. Move it out of the store's directory");
  const auto version = number_after(header, kBegin);
  if (version && *version > kFormatVersion)
    throw problem(StoreCode::kFutureVersion, 8 + kBegin.size(),
                  "format version " + std::to_string(*version) + "; this fusedpo knows version " +
                      std::to_string(kFormatVersion) + ". Upgrade fusedpo");
  const auto records = number_after(header, R"("records":")");
  const auto token_values = number_after(header, R"("token_values":")");
  if (!records || !token_values) damaged(8, "the header does not tell the number of records");
  layout_ = SnapshotLayout(identity, *records, *token_values);
  const std::string_view expected = std::string_view(layout_.header).substr(8);
  const auto differ = std::mismatch(header.begin(), header.end(), expected.begin(), expected.end());
  if (differ.first != header.end() || differ.second != expected.end()) {
    const auto at = static_cast<std::uint64_t>(differ.first - header.begin());
    constexpr std::string_view kDigest = R"("identity_digest":")";
    const std::size_t digest = header.find(kDigest) + kDigest.size();
    if (at >= digest && at < digest + 32)
      throw problem(StoreCode::kIdentity, 8 + at,
                    "this snapshot was made for another identity than identity.json tells. Move "
                    "it to the store it belongs to");
    damaged(8 + at, "the header is not what it was when it was written");
  }
  if (bytes_.size() != layout_.size)
    damaged(std::min<std::uint64_t>(bytes_.size(), layout_.size),
            "the file must have " + std::to_string(layout_.size) + " bytes; it has " +
                std::to_string(bytes_.size()));
}

void Snapshot::damaged(std::uint64_t offset, const std::string& what) const {
  throw StoreError(StoreCode::kDamaged, path_, offset,
                   path_ + ", offset " + std::to_string(offset) + ": " + what +
                       ". Restore the file, or remove it and score what it held again; "
                       "verify lists all damage");
}

std::uint64_t Snapshot::token_count(std::uint64_t i) const {
  if (layout_.token_values == 0) return 0;
  const unsigned char* p = bytes_.data() + layout_.token_offsets + 8 * i;
  return load_le<std::uint64_t>(p + 8) - load_le<std::uint64_t>(p);
}

bool Snapshot::read(std::uint64_t i, Record* record) const {
  unsigned char cell[kCell];
  const unsigned char* data = bytes_.data();
  std::memcpy(cell, data + layout_.keys + 16 * i, 16);
  std::memcpy(cell + 16, data + layout_.logps + 8 * i, 8);
  std::memcpy(cell + 24, data + layout_.num_tokens + 4 * i, 4);
  std::memcpy(cell + 28, data + layout_.crcs + 4 * i, 4);
  if (!record->decode(cell)) return false;
  record->has_tokens = token_count(i) != 0;
  return true;
}

Record Snapshot::at(std::uint64_t i) const {
  Record record;
  if (!read(i, &record))
    damaged(layout_.keys + 16 * i,
            "the checksum of record " + std::to_string(i) + " does not hold");
  // A damaged range must neither lose token values in silence nor invent any. Where there are
  // values, read_tokens checks them.
  if (record.has_tokens ? token_count(i) != record.num_tokens : token_problem(i, record) != nullptr)
    damaged(layout_.token_offsets + 8 * i, token_problem(i, record));
  return record;
}

const char* Snapshot::token_problem(std::uint64_t i, const Record& record) const {
  if (layout_.token_values == 0) return nullptr;
  const unsigned char* p = bytes_.data() + layout_.token_offsets + 8 * i;
  const auto begin = load_le<std::uint64_t>(p), end = load_le<std::uint64_t>(p + 8);
  const std::uint64_t count = end - begin;
  if (begin > end || end > layout_.token_values || (count != 0 && count != record.num_tokens))
    return "the range of a record's token values is wrong";
  const auto crc = load_le<std::uint32_t>(bytes_.data() + layout_.token_crcs + 4 * i);
  if (crc != token_crc(record.key, bytes_.data() + layout_.tokens + 4 * begin, 4 * count))
    return "the checksum of a record's token values does not hold";
  return nullptr;
}

void Snapshot::read_tokens(std::uint64_t i, const Record& record, float* values) const {
  if (const char* what = token_problem(i, record)) damaged(layout_.token_offsets + 8 * i, what);
  const auto begin = load_le<std::uint64_t>(bytes_.data() + layout_.token_offsets + 8 * i);
  const unsigned char* p = bytes_.data() + layout_.tokens + 4 * begin;
  for (std::uint32_t t = 0; t < record.num_tokens; ++t)
    values[t] = load_le<float>(p + std::size_t{4} * t);
}

void Snapshot::prefetch(std::uint64_t i) const {
  __builtin_prefetch(bytes_.data() + layout_.logps + 8 * i);
  __builtin_prefetch(bytes_.data() + layout_.num_tokens + 4 * i);
  __builtin_prefetch(bytes_.data() + layout_.crcs + 4 * i);
}

void Snapshot::find(const unsigned char* keys, std::size_t n, std::int64_t* rows) const {
  struct Sorted {
    const unsigned char* keys;
    Key operator()(std::uint64_t i) const { return Key::load(keys + 16 * i); }
    void prefetch(std::uint64_t i) const { __builtin_prefetch(keys + 16 * i); }
  };
  const auto target = [keys](std::size_t j) { return Key::load(keys + 16 * j); };
  lower_bounds(Sorted{this->keys()}, size(), target, n, [&](std::size_t j, std::uint64_t row) {
    if (row < size() && key(row) == target(j)) {
      rows[j] = static_cast<std::int64_t>(row);
      prefetch(row);
      return;
    }
    // A damaged key can mislead the search, but then the search ends beside it.
    if (row > 0) at(row - 1);
    if (row < size()) at(row);
    rows[j] = -1;
  });
}

std::string snapshot_name(const std::string& header, std::span<const Digest> columns) {
  Blake2b hash(16);
  hash.update(header.data(), header.size());
  for (const Digest& column : columns) hash.update(column.data(), column.size());
  Digest digest;
  hash.finish(digest.data());
  return "snapshot-" + hex_of(digest) + ".safetensors";
}

}  // namespace fusedpo
