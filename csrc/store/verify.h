// Checks everything a store promises, and goes on after the first problem. Changes nothing and
// writes nothing: it works on a read-only directory.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "store/file.h"
#include "store/snapshot.h"

namespace fusedpo {

struct Problem {
  std::string file;  // name within the store
  std::optional<std::uint64_t> offset;
  std::string what;
};

struct FileReport {
  std::string name;
  const char* kind = "";  // "log", "snapshot"
  std::uint64_t bytes = 0, records = 0;
  bool closed = true;  // false: a log whose writer is at work, or died
};

struct VerifyReport {
  std::uint64_t records = 0;        // distinct keys that are intact
  std::vector<Problem> problems;    // the first `limit`
  std::uint64_t problem_count = 0;  // all of them
  std::vector<Problem> notes;       // no problem, but good to know: bytes that were never promised
  std::vector<FileReport> files;
};

VerifyReport verify_store(FileSystem& files, const std::string& directory,
                          const StoreIdentity& identity, std::uint64_t limit,
                          std::uint64_t memory_bytes);

}  // namespace fusedpo
