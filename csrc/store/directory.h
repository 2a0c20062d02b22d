// Which files a store consists of, seen without locks while merges add and remove some.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "store/file.h"

namespace fusedpo {

struct StoreFiles {
  std::vector<std::string> logs, snapshots, temporaries;  // names, sorted
};

StoreFiles list_store(FileSystem& files, const std::string& directory);

// A log that a merge of abandoned logs has renamed: its writer can confirm nothing more.
bool is_taken(const std::string& log_name);
std::string taken_name(const std::string& log_name);

// Calls read(files) with a listing in which every record of the store is in at least one file, and
// again when a merge removed a file before it was opened (read throws kMissing).
//
// A merge makes its snapshot visible before it removes what it merged. So a record is missed only
// if the listing passed by the new name before it came and by the old one after it went; then the
// old name was there one listing earlier. Listing until nothing has vanished excludes that.
void with_stable_listing(FileSystem& files, const std::string& directory,
                         const std::function<void(const StoreFiles&)>& read);

}  // namespace fusedpo
