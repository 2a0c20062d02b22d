#include "store/directory.h"

#include <algorithm>
#include <string_view>

#include "store/error.h"

namespace fusedpo {
namespace {

constexpr std::string_view kTaken = ".taken.fdlog";
constexpr std::string_view kLog = ".fdlog";
constexpr int kAttempts = 1000;

}  // namespace

StoreFiles list_store(FileSystem& files, const std::string& directory) {
  StoreFiles found;
  for (std::string& name : files.list(directory)) {
    if (name.ends_with(kLog))
      found.logs.push_back(std::move(name));
    else if (name.starts_with("snapshot-") && name.ends_with(".safetensors"))
      found.snapshots.push_back(std::move(name));
    else if (name.ends_with(".tmp"))
      found.temporaries.push_back(std::move(name));
  }
  return found;
}

bool is_taken(const std::string& log_name) { return log_name.ends_with(kTaken); }

std::string taken_name(const std::string& log_name) {
  return log_name.substr(0, log_name.size() - kLog.size()) + std::string(kTaken);
}

void with_stable_listing(FileSystem& files, const std::string& directory,
                         const std::function<void(const StoreFiles&)>& read) {
  StoreFiles before = list_store(files, directory);
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    StoreFiles now = list_store(files, directory);
    const bool nothing_vanished = std::ranges::includes(now.logs, before.logs) &&
                                  std::ranges::includes(now.snapshots, before.snapshots);
    before = std::move(now);
    if (!nothing_vanished) continue;
    try {
      read(before);
      return;
    } catch (const StoreError& e) {
      if (e.code != StoreCode::kMissing) throw;
    }
  }
  throw StoreError(StoreCode::kIo, directory, std::nullopt,
                   directory +
                       ": files keep vanishing while they are read. Do merges run "
                       "without pause? Run again when they have ended");
}

}  // namespace fusedpo
