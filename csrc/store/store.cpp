#include "store/store.h"

#include <algorithm>
#include <utility>

#include "store/directory.h"
#include "store/error.h"

namespace fusedpo {

Store::Store(FileSystem& files, std::string directory, StoreIdentity identity)
    : files_(files), directory_(std::move(directory)), identity_(std::move(identity)) {
  refresh();
}

std::shared_ptr<const View> Store::view() const {
  const std::lock_guard lock(mutex_);
  return view_;
}

void Store::refresh() {
  const std::lock_guard one_at_a_time(refresh_mutex_);
  const auto previous = view();
  std::shared_ptr<const View> fresh;
  with_stable_listing(files_, directory_, [&](const StoreFiles& listing) {
    fresh = std::make_shared<View>(files_, directory_, identity_, listing, previous);
  });
  const std::lock_guard lock(mutex_);
  view_ = std::move(fresh);
}

std::unique_ptr<LogWriter> Store::writer(const std::string& name) const {
  const auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '_';
  };
  if (name.empty() || name.size() > 64 || !std::all_of(name.begin(), name.end(), allowed))
    throw StoreError(
        StoreCode::kBadValue, directory_, std::nullopt,
        "a writer's name must be 1 to 64 letters, digits, - or _; got \"" + name + "\"");
  return std::make_unique<LogWriter>(files_, directory_, name, identity_.digest, random_id());
}

MergeReport Store::merge(const MergeOptions& options) {
  MergeReport report = merge_store(files_, directory_, identity_, options);
  refresh();
  return report;
}

std::unique_ptr<SortedRecords> Store::sorted(std::uint64_t memory_bytes) const {
  return read_sorted(files_, directory_, identity_, memory_bytes);
}

}  // namespace fusedpo
