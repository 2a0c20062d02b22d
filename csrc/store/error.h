// Everything that can go wrong with a reference store: one exception type, one code per remedy.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

namespace fusedpo {

enum class StoreCode {
  kIo,                 ///< The operating system refused: permission, full disk, broken device.
  kMissing,            ///< A file or directory is not there.
  kBadMagic,           ///< A file of the store's name pattern is no file of a store.
  kFutureVersion,      ///< Written by a newer fusedpo.
  kForeignEndianness,  ///< Written with the other byte order.
  kDamaged,            ///< Bytes that were promised have changed.
  kIdentity,           ///< Made with another model, adapter or setting.
  kContradiction,      ///< One key with two values that differ by more than the tolerance.
  kBadValue,           ///< NaN, infinite or positive log-prob, bad token id, wrong shape.
  kEmptyCompletion,    ///< A completion without tokens has no log-prob.
  kClosed,             ///< The writer was closed, failed earlier, or belongs to another process.
  kTaken,              ///< A merge took over the log of a writer that was still alive.
};

inline const char* name(StoreCode code) {
  switch (code) {
    case StoreCode::kIo:
      return "io";
    case StoreCode::kMissing:
      return "missing";
    case StoreCode::kBadMagic:
      return "bad_magic";
    case StoreCode::kFutureVersion:
      return "future_version";
    case StoreCode::kForeignEndianness:
      return "foreign_endianness";
    case StoreCode::kDamaged:
      return "damaged";
    case StoreCode::kIdentity:
      return "identity";
    case StoreCode::kContradiction:
      return "contradiction";
    case StoreCode::kBadValue:
      return "bad_value";
    case StoreCode::kEmptyCompletion:
      return "empty_completion";
    case StoreCode::kClosed:
      return "closed";
    case StoreCode::kTaken:
      return "taken";
  }
  return "unknown";
}

// `message` says what must hold, what was found, and what to do.
class StoreError : public std::runtime_error {
 public:
  StoreError(StoreCode code, std::string path, std::optional<std::uint64_t> offset,
             const std::string& message)
      : std::runtime_error(message), code(code), path(std::move(path)), offset(offset) {}

  StoreCode code;
  std::string path;
  std::optional<std::uint64_t> offset;  // in bytes from the start of `path`, where there is one
};

}  // namespace fusedpo
