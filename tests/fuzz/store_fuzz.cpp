// Feeds bytes to everything that reads a store's files: opening, looking up, verifying, merging.
// Whatever they are, the answer is a value or a StoreError.
//
// Random bytes rarely get past a checksum. So the first byte chooses what is repaired first: then
// it is the fuzzer that decides counts, offsets and flags, and the reader believes its checksums.
#include <cstdlib>

#include "store/log_reader.h"
#include "store/merge.h"
#include "store/snapshot.h"
#include "store_cases.h"

namespace fusedpo {
namespace {

// A log: header and markers made valid, checksums of records made to hold.
Bytes repaired_log(Bytes bytes, bool records) {
  if (bytes.size() < kLogHeader) bytes.resize(kLogHeader);
  LogHeader{test_identity().digest, 1}.encode(bytes.data());
  const std::size_t cells = bytes.size() / kCell;
  std::uint32_t range = 0;
  for (std::size_t c = 2; c < cells; ++c) {
    unsigned char* cell = bytes.data() + c * kCell;
    // 0xfd as first byte stands for a marker here, so that few mutations make one.
    if (cell[0] == 0xfd && c + 1 < cells) {
      const Marker marker{c * kCell, (cell[1] & 1) != 0, 1, mask_crc32c(range)};
      marker.encode(cell);
      marker.encode(cell + kCell);
      range = 0;
      ++c;
      continue;
    }
    if (records) {
      store_le(cell + 24, load_le<std::uint32_t>(cell + 24) & (kHasTokens | 15));
      store_le(cell + 28, masked_crc(cell, 28));
      Record record;
      record.decode(cell);
      const std::size_t values = 4 * record.num_tokens;
      if (record.has_tokens && (c + 1) * kCell + values + 4 <= bytes.size())
        store_le(cell + kCell + values, token_crc(record.key, cell + kCell, values));
    }
    range = crc32c(cell, kCell, range);
  }
  return bytes;
}

// A snapshot: the header that belongs to counts which the bytes choose, then the bytes as columns.
Bytes repaired_snapshot(const Bytes& bytes, bool records) {
  if (bytes.size() < 2) return bytes;
  const SnapshotLayout layout(test_identity(), bytes[0] % 16, bytes[1] % 32);
  Bytes file(layout.header.begin(), layout.header.end());
  file.insert(file.end(), bytes.begin() + 2, bytes.end());
  file.resize(layout.size);
  for (std::uint64_t i = 0; records && i < layout.records; ++i) {
    unsigned char cell[kCell];
    std::copy_n(file.begin() + static_cast<std::ptrdiff_t>(layout.keys + 16 * i), 16, cell);
    std::copy_n(file.begin() + static_cast<std::ptrdiff_t>(layout.logps + 8 * i), 8, cell + 16);
    std::copy_n(file.begin() + static_cast<std::ptrdiff_t>(layout.num_tokens + 4 * i), 4,
                cell + 24);
    store_le(file.data() + layout.crcs + 4 * i, masked_crc(cell, 28));
  }
  return file;
}

template <class Call>
void or_store_error(Call&& call) {
  try {
    call();
  } catch (const StoreError& e) {
    if (*name(e.code) == '\0') std::abort();
  }
}

}  // namespace
}  // namespace fusedpo

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  using namespace fusedpo;
  if (size == 0) return 0;
  const unsigned char mode = data[0];
  Bytes bytes(data + 1, data + size);
  FaultFileSystem files;
  if (mode & 1) {
    if (mode & 2) bytes = repaired_log(std::move(bytes), (mode & 4) != 0);
    files.put("s/x-1.fdlog", bytes);
  } else {
    if (mode & 2) bytes = repaired_snapshot(bytes, (mode & 4) != 0);
    files.put("s/snapshot-1.safetensors", bytes);
  }
  if (mode & 8) {  // beside a good log, with which it may contradict
    LogWriter writer = writer_on(files, 2);
    append(writer, range(0, 5), true);
    writer.close();
  }
  or_store_error([&] {
    const Store store(files, "s", test_identity());
    const auto view = store.view();
    for (std::uint64_t i = 0; i < 5; ++i) or_store_error([&] { look(*view, i); });
    // Every 16 bytes of the input as a key, so that there is something to be found.
    for (std::size_t at = 0; at + 16 <= bytes.size(); at += 16) {
      or_store_error([&] {
        Record record;
        view->lookup(bytes.data() + at, 1, &record);
        std::vector<float> values(record.has_tokens ? record.num_tokens : 0);
        view->lookup_tokens(bytes.data() + at, &record, 1, values.data());
      });
    }
    or_store_error([&] { view->size(); });
  });
  const VerifyReport report = verify_store(files, "s", test_identity(), 10, 1 << 12);
  or_store_error([&] {
    MergeOptions options;
    options.memory_bytes = 1;
    options.abandoned = (mode & 16) != 0;
    const MergeReport merged = merge_store(files, "s", test_identity(), options);
    // What a merge accepts is sound, but for the name that the fuzzer gave the snapshot.
    if ((mode & 1) && report.problem_count > 0) std::abort();
    // A lone snapshot is left as it is, unread.
    if (!merged.removed.empty() &&
        verify_store(files, "s", test_identity(), 10, 1 << 12).problem_count > 0)
      std::abort();
  });
  return 0;
}
