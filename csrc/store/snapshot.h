// A snapshot: all records sorted by key as columns of one .safetensors file, mapped and searched in
// place. Opening reads the header only; a record's checksum is checked when it is looked up.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "store/error.h"
#include "store/file.h"
#include "store/format.h"

namespace fusedpo {

// What every file of one store agrees on.
struct StoreIdentity {
  std::string json;  // canonical JSON of the compared fields; ASCII
  Digest digest{};   // its BLAKE2b-128
  double tolerance = 1e-6;
};

StoreIdentity make_identity(std::string json, double tolerance);

// Where everything is. A function of the identity and two numbers, so that a reader rebuilds the
// header it expects and compares: no other byte is accepted, and no JSON is parsed.
struct SnapshotLayout {
  std::uint64_t records = 0, token_values = 0;
  std::string header;  // with its length in front, padded with spaces to a multiple of 4096 bytes
  // Offsets in the file. The token columns exist when token_values > 0.
  std::uint64_t keys = 0, logps = 0, num_tokens = 0, crcs = 0;
  std::uint64_t token_offsets = 0, token_crcs = 0, tokens = 0;
  std::uint64_t size = 0;

  SnapshotLayout() = default;
  SnapshotLayout(const StoreIdentity& identity, std::uint64_t records, std::uint64_t token_values);
};

class Snapshot {
 public:
  // Throws kBadMagic, kFutureVersion, kIdentity, or kDamaged for a header that is not exactly what
  // this store writes, or a size that does not fit it.
  Snapshot(FileSystem& files, const std::string& path, const StoreIdentity& identity);

  std::uint64_t size() const { return layout_.records; }
  const std::string& path() const { return path_; }
  const SnapshotLayout& layout() const { return layout_; }
  std::span<const unsigned char> bytes() const { return bytes_; }

  Key key(std::uint64_t i) const { return Key::load(bytes_.data() + layout_.keys + 16 * i); }
  const unsigned char* keys() const { return bytes_.data() + layout_.keys; }
  // False when the record's checksum does not hold. Where has_tokens is set, token_problem() tells
  // whether there really are values.
  bool read(std::uint64_t i, Record* record) const;
  // The same, as an error; has_tokens is right.
  Record at(std::uint64_t i) const;
  // Throws kDamaged.
  void read_tokens(std::uint64_t i, const Record& record, float* values) const;
  // What is wrong with the token values of record i, or null.
  const char* token_problem(std::uint64_t i, const Record& record) const;

  // rows[i] = the row of keys[i] (16 bytes each), or -1. Throws kDamaged where a damaged neighbour
  // may have misled the search.
  void find(const unsigned char* keys, std::size_t n, std::int64_t* rows) const;
  void prefetch(std::uint64_t i) const;
  void release_memory() const { mapping_->release_memory(); }

 private:
  std::uint64_t token_count(std::uint64_t i) const;
  [[noreturn]] void damaged(std::uint64_t offset, const std::string& what) const;

  std::string path_;
  std::unique_ptr<Mapping> mapping_;
  std::span<const unsigned char> bytes_;
  SnapshotLayout layout_;
};

// 32 hex digits over the header and the columns: the name of the file, so that equal content has an
// equal name, and verify can tell a file that was put together from parts of others.
std::string snapshot_name(const std::string& header, std::span<const Digest> columns);

}  // namespace fusedpo
