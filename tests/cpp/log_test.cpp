// The log: what a sync promised is read back or reported, whatever happens to the bytes.
#include <gtest/gtest.h>

#include <functional>
#include <new>
#include <random>
#include <set>

#include "store/log_reader.h"
#include "store_cases.h"

namespace fusedpo {
namespace {

struct Read {
  LogHead head;
  LogScan scan;
  std::map<Key, std::pair<double, std::uint32_t>> records;
  std::string error;  // code of the exception
};

Read read(const Bytes& bytes, std::uint64_t begin = 0) {
  FaultFileSystem files;
  files.put("s/log", bytes);
  Read seen;
  try {
    const auto file = files.open("s/log");
    seen.head = read_log_head(*file, "s/log", test_identity().digest);
    seen.scan = scan_log(*file, seen.head, begin, [&](const Record& record, std::uint64_t) {
      seen.records[record.key] = {record.logp, record.num_tokens};
    });
  } catch (const StoreError& e) {
    seen.error = name(e.code);
  }
  return seen;
}

bool all_right(const Read& seen) {
  std::map<Key, std::uint64_t> ids;
  for (std::uint64_t i = 0; i < 100; ++i) ids[key_of(i)] = i;
  for (const auto& [key, value] : seen.records) {
    const auto it = ids.find(key);
    if (it == ids.end() || value.first != logp_of(it->second) ||
        value.second != num_tokens_of(it->second))
      return false;
  }
  return true;
}

// A log with three syncs: 3 records, 2 records (with token values, if wanted), 1 record.
struct SmallLog {
  Bytes bytes;
  std::vector<std::uint64_t> ends;  // of the marker pairs; records before: 3, 5, 6
};

SmallLog small_log(bool tokens, bool closed) {
  FaultFileSystem files;
  LogWriter writer = writer_on(files, 0x1234);
  SmallLog log;
  const std::string path = "s/w-0000000000001234.fdlog";
  append(writer, range(0, 3));
  writer.sync();
  log.ends.push_back(files.content(path).size());
  append(writer, range(3, 5), tokens);
  writer.sync();
  log.ends.push_back(files.content(path).size());
  append(writer, range(5, 6));
  closed ? writer.close() : writer.sync();
  log.bytes = files.content(path);
  log.ends.push_back(log.bytes.size());
  return log;
}

TEST(Log, GivesBackWhatWasAppended) {
  for (const bool closed : {false, true}) {
    const Read seen = read(small_log(true, closed).bytes);
    EXPECT_EQ(seen.error, "");
    EXPECT_EQ(seen.records.size(), 6u);
    EXPECT_TRUE(all_right(seen));
    EXPECT_EQ(seen.head.closed, closed);
    EXPECT_EQ(seen.scan.damage_count, 0u);
    EXPECT_FALSE(seen.head.discardable);
    EXPECT_FALSE(seen.head.bad_copy);
  }
}

TEST(Log, HasTheBytesOfTheFormatDocument) {
  const SmallLog log = small_log(false, true);
  ASSERT_EQ(log.bytes.size(), 64u + 3 * 32 + 64 + 2 * 32 + 64 + 32 + 64);
  EXPECT_EQ(std::string(log.bytes.begin(), log.bytes.begin() + 8), "fdpo.log");
  EXPECT_EQ(load_le<std::uint32_t>(log.bytes.data() + 8), 0x01020304u);
  EXPECT_EQ(log.bytes[8], 4);  // little-endian: the lowest byte first
  EXPECT_EQ(load_le<std::uint32_t>(log.bytes.data() + 12), 1u);
  EXPECT_EQ(Key::load(log.bytes.data() + 64), key_of(0));
  EXPECT_EQ(load_le<double>(log.bytes.data() + 80), logp_of(0));
  EXPECT_EQ(load_le<std::uint32_t>(log.bytes.data() + 88), num_tokens_of(0));
  EXPECT_EQ(std::string(log.bytes.end() - 64, log.bytes.end() - 56), "fdpo.syn");
}

TEST(Log, IsNotCreatedBeforeTheFirstRecord) {
  FaultFileSystem files;
  LogWriter writer = writer_on(files, 1);
  writer.sync();
  writer.close();
  EXPECT_TRUE(files.paths().empty());
}

TEST(Log, CutAtEveryByteKeepsEverySyncBelowTheCut) {
  for (const bool tokens : {false, true}) {
    const SmallLog log = small_log(tokens, true);
    for (std::size_t cut = 0; cut < log.bytes.size(); ++cut) {
      const Read seen =
          read(Bytes(log.bytes.begin(), log.bytes.begin() + static_cast<std::ptrdiff_t>(cut)));
      ASSERT_EQ(seen.error, "") << cut;
      ASSERT_TRUE(all_right(seen)) << cut;
      ASSERT_EQ(seen.scan.damage_count, 0u) << cut;
      std::size_t promised = 0;
      const std::size_t counts[] = {3, 5, 6};
      for (std::size_t i = 0; i < 3; ++i)
        // One whole copy of the marker is enough.
        if (cut >= log.ends[i] - kCell) promised = counts[i];
      ASSERT_EQ(seen.records.size(), promised) << cut;
      const bool clean = cut == 0 || cut == kLogHeader ||
                         std::find(log.ends.begin(), log.ends.end(), cut) != log.ends.end();
      ASSERT_EQ(seen.head.discardable.has_value(), !clean) << cut;
    }
  }
}

TEST(Log, EveryFlippedBitBelowTheLastMarkerIsReportedAndNoRecordIsLostSilently) {
  for (const bool tokens : {false, true}) {
    const SmallLog log = small_log(tokens, false);
    const std::size_t last_pair = log.bytes.size() - kMarkerPair;
    for (std::size_t bit = 0; bit < 8 * log.bytes.size(); ++bit) {
      Bytes bytes = log.bytes;
      bytes[bit / 8] ^= static_cast<unsigned char>(1u << (bit % 8));
      const Read seen = read(bytes);
      ASSERT_TRUE(all_right(seen)) << bit;
      if (bit / 8 < last_pair) {
        ASSERT_TRUE(seen.error != "" || seen.scan.damage_count > 0) << bit;
        if (seen.error.empty() && bit / 8 >= kLogHeader) {
          const std::uint64_t at = seen.scan.damage.front().offset;
          ASSERT_LE(at, bit / 8) << bit;
          ASSERT_LT(bit / 8 - at, kCell + token_bytes(13)) << bit;
        }
      } else {
        // One of two copies: the other one still holds the promise, and it is told.
        ASSERT_EQ(seen.error, "") << bit;
        ASSERT_EQ(seen.records.size(), 6u) << bit;
        ASSERT_EQ(seen.scan.damage_count, 0u) << bit;
        ASSERT_TRUE(seen.head.bad_copy) << bit;
        ASSERT_EQ(seen.head.bad_copy->offset, bit / 8 / kCell * kCell) << bit;
      }
    }
  }
}

// Damage where only a change of the file explains it; a note where a crash in sync() or close()
// may.
TEST(Log, ABadCopyOfTheLastMarkerIsReportedByVerify) {
  const auto verify = [](const Bytes& bytes) {
    FaultFileSystem files;
    files.put("s/w-0000000000001234.fdlog", bytes);
    const VerifyReport report = verify_store(files, "s", test_identity(), 10, 1 << 20);
    EXPECT_EQ(report.records, 6u);
    return std::make_pair(report.problem_count, report.notes.size());
  };
  using Counts = std::pair<std::uint64_t, std::size_t>;
  for (const bool closed : {false, true}) {
    const SmallLog log = small_log(true, closed);
    EXPECT_EQ(verify(log.bytes), Counts(0, 0));
    for (const std::size_t copy : {std::size_t{0}, kCell}) {
      const auto begin = log.bytes.size() - kMarkerPair + copy;
      Bytes flipped = log.bytes;
      flipped[begin + 3] ^= 0x80;
      EXPECT_EQ(verify(flipped), closed ? Counts(1, 0) : Counts(0, 1)) << copy;
      for (std::size_t written = 0; written < kCell; written += 5) {
        Bytes torn = log.bytes;
        std::fill_n(torn.begin() + static_cast<std::ptrdiff_t>(begin + written), kCell - written,
                    0);
        EXPECT_EQ(verify(torn), Counts(0, 1)) << copy << " " << written;
      }
    }
  }
}

TEST(Log, EveryFlippedBitOfTokenValuesIsAnErrorAtLookup) {
  const SmallLog log = small_log(true, true);
  const std::uint64_t record = log.ends[0];
  Record decoded;
  ASSERT_TRUE(decoded.decode(log.bytes.data() + record));
  std::vector<float> values(decoded.num_tokens);
  read_log_tokens(log.bytes, "log", record, decoded, values.data());
  EXPECT_EQ(values, tokens_of(3));
  const std::size_t size = 4 * (decoded.num_tokens + 1);
  for (std::size_t bit = 0; bit < 8 * size; ++bit) {
    Bytes bytes = log.bytes;
    bytes[record + kCell + bit / 8] ^= static_cast<unsigned char>(1u << (bit % 8));
    EXPECT_THROW(read_log_tokens(bytes, "log", record, decoded, values.data()), StoreError) << bit;
  }
}

TEST(Log, MovedRecordsAreDamageThoughEachOfThemIsIntact) {
  SmallLog log = small_log(false, false);
  std::swap_ranges(log.bytes.begin() + 64, log.bytes.begin() + 96, log.bytes.begin() + 96);
  EXPECT_EQ(read(log.bytes).scan.damage_count, 1u);
}

TEST(Log, GarbageAboveTheLastMarkerIsDiscardableAndReported) {
  SmallLog log = small_log(false, false);
  const std::uint64_t end = log.bytes.size();
  std::mt19937_64 random(1);
  for (int i = 0; i < 1000; ++i) log.bytes.push_back(static_cast<unsigned char>(random()));
  const Read seen = read(log.bytes);
  EXPECT_EQ(seen.records.size(), 6u);
  EXPECT_EQ(seen.scan.damage_count, 0u);
  ASSERT_TRUE(seen.head.discardable);
  EXPECT_EQ(seen.head.discardable->offset, end);
}

TEST(Log, MarkerOfAnotherFileOrPlacePromisesNothing) {
  const SmallLog log = small_log(false, false);
  Bytes moved = log.bytes;  // the last marker pair once more, behind garbage
  moved.insert(moved.end(), 32, 7);
  moved.insert(moved.end(), log.bytes.end() - kMarkerPair, log.bytes.end());
  EXPECT_EQ(read(moved).scan.damage_count, 0u);
  EXPECT_EQ(read(moved).records.size(), 6u);
  Bytes foreign = log.bytes;
  foreign.insert(foreign.end(), 32, 7);
  Marker marker{foreign.size(), false, 0x9999, 0};
  foreign.resize(foreign.size() + kCell);
  marker.encode(foreign.data() + foreign.size() - kCell);
  EXPECT_EQ(read(foreign).scan.damage_count, 0u);
  EXPECT_EQ(read(foreign).records.size(), 6u);
}

TEST(Log, ReadsOnFromAnEarlierScan) {
  const SmallLog log = small_log(true, false);
  const Read rest = read(log.bytes, log.ends[0]);
  EXPECT_EQ(rest.records.size(), 3u);
  EXPECT_FALSE(rest.records.contains(key_of(0)));
  EXPECT_EQ(read(log.bytes, log.ends[2]).records.size(), 0u);
}

TEST(Log, HeadersOfOthersAreRefusedByName) {
  const auto with_header = [](const std::function<void(unsigned char*)>& change) {
    Bytes bytes = small_log(false, false).bytes;
    change(bytes.data());
    store_le(bytes.data() + 60, masked_crc(bytes.data(), 60));
    return read(bytes).error;
  };
  EXPECT_EQ(with_header([](unsigned char* p) { p[0] = 'x'; }), "bad_magic");
  EXPECT_EQ(with_header([](unsigned char* p) { store_le(p + 12, std::uint32_t{2}); }),
            "future_version");
  EXPECT_EQ(with_header([](unsigned char* p) { store_le(p + 8, std::uint32_t{0x04030201}); }),
            "foreign_endianness");
  EXPECT_EQ(with_header([](unsigned char* p) { p[16] ^= 1; }), "identity");
  EXPECT_EQ(read(Bytes(1000, 'x')).error, "bad_magic");
}

TEST(Log, BadRecordsAreRefusedWholeBatchesAtATime) {
  FaultFileSystem files;
  LogWriter writer = writer_on(files, 1);
  const std::vector<unsigned char> keys(32, 1);
  const std::vector<double> good = {-1, -2};
  const std::vector<std::uint32_t> lengths = {1, 2};
  const std::vector<float> tokens = {-1, -1, -1};
  const auto code = [&](const RecordBatch& batch) -> std::string {
    try {
      writer.append(batch);
    } catch (const StoreError& e) {
      return name(e.code);
    }
    return "";
  };
  const double nan = std::nan("");
  for (const double bad : {nan, HUGE_VAL, -HUGE_VAL, 1e-300, 5.0}) {
    const std::vector<double> logps = {-1, bad};
    EXPECT_EQ(code({keys, logps, lengths, {}, false}), "bad_value") << bad;
    const std::vector<float> values = {-1, static_cast<float>(bad == 1e-300 ? 1 : bad), -1};
    EXPECT_EQ(code({keys, good, lengths, values, true}), "bad_value") << bad;
  }
  const std::vector<std::uint32_t> empty = {1, 0}, huge = {1, kHasTokens}, longer = {2, 2};
  EXPECT_EQ(code({keys, good, empty, {}, false}), "empty_completion");
  EXPECT_EQ(code({keys, good, huge, {}, false}), "bad_value");
  EXPECT_EQ(code({keys, good, longer, tokens, true}), "bad_value");
  EXPECT_EQ(code({std::span(keys).first(16), good, lengths, {}, false}), "bad_value");
  EXPECT_EQ(writer.records(), 0u);
  EXPECT_TRUE(files.paths().empty());
  EXPECT_EQ(code({keys, good, lengths, tokens, true}), "");
}

TEST(Log, NegativeZeroIsStoredAsZero) {
  FaultFileSystem files;
  LogWriter writer = writer_on(files, 1);
  const std::vector<unsigned char> keys(16, 1);
  const std::vector<double> logps = {-0.0};
  const std::vector<std::uint32_t> lengths = {1};
  writer.append({keys, logps, lengths, {}, false});
  writer.close();
  EXPECT_EQ(load_le<std::uint64_t>(files.content(files.paths().at(0)).data() + 80), 0u);
}

TEST(Log, FailedSyncIsFatalAndNeverRetried) {
  FaultFileSystem files;
  LogWriter writer = writer_on(files, 1);
  append(writer, range(0, 3));
  writer.sync();
  append(writer, range(3, 6));
  files.fail_syncs(true);
  EXPECT_THROW(writer.sync(), StoreError);
  files.fail_syncs(false);  // a second sync would succeed, and lie
  const std::uint64_t calls = files.calls();
  for (const auto& call : std::vector<std::function<void()>>{
           [&] { writer.sync(); }, [&] { writer.close(); }, [&] { append(writer, {7}); }}) {
    try {
      call();
      ADD_FAILURE() << "a broken writer was used";
    } catch (const StoreError& e) {
      EXPECT_EQ(e.code, StoreCode::kClosed);
    }
  }
  EXPECT_EQ(files.calls(), calls);
  std::mt19937_64 random(1);
  files.crash(random);
  const Read seen = read(files.content(files.paths().at(0)));
  EXPECT_EQ(seen.records.size(), 3u);
  EXPECT_EQ(seen.scan.damage_count, 0u);
}

// Otherwise its next marker would confirm bytes that are not there: damage that nobody did.
TEST(Log, WriterIsBrokenByAnyExceptionWithinAStep) {
  FaultFileSystem files;
  LogWriter writer = writer_on(files, 1);
  append(writer, range(0, 3));
  writer.sync();
  files.run_out_of_memory_at(files.calls());
  EXPECT_THROW(append(writer, range(3, 40000)), std::bad_alloc);  // more than the buffer holds
  for (const auto& call : std::vector<std::function<void()>>{
           [&] { append(writer, {7}); }, [&] { writer.sync(); }, [&] { writer.close(); }}) {
    try {
      call();
      ADD_FAILURE() << "a broken writer was used";
    } catch (const StoreError& e) {
      EXPECT_EQ(e.code, StoreCode::kClosed);
      EXPECT_NE(std::string(e.what()).find(std::bad_alloc().what()), std::string::npos) << e.what();
    }
  }
  const Read seen = read(files.content(files.paths().at(0)));
  EXPECT_EQ(seen.records.size(), 3u);
  EXPECT_EQ(seen.scan.damage_count, 0u);
}

// Random syncs and a power cut at every call: what a sync confirmed is there, nothing is wrong, and
// what was never confirmed is not mistaken for damage, in whatever order the disk kept it.
TEST(Log, PowerCutAtEveryCallLosesNothingThatWasConfirmed) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 60; ++round) {
    for (std::uint64_t call = 0;; ++call) {
      FaultFileSystem files;
      files.die_at(call);
      std::uint64_t confirmed = 0, appended = 0;
      bool died = false;
      {
        LogWriter writer = writer_on(files, random());
        try {
          for (int sync = 0; sync < 4; ++sync) {
            for (std::uint64_t n = random() % 3; n > 0; --n) {
              append(writer, {appended}, random() % 2 == 0);
              ++appended;
            }
            writer.sync();
            confirmed = appended;
          }
          writer.close();
          confirmed = appended;
        } catch (const StoreError&) {
          died = true;
        }
      }
      files.crash(random);
      const auto paths = files.paths();
      Read seen;
      if (!paths.empty()) seen = read(files.content(paths.at(0)));
      ASSERT_EQ(seen.error, "") << round << " " << call;
      ASSERT_EQ(seen.scan.damage_count, 0u) << round << " " << call;
      ASSERT_TRUE(all_right(seen));
      for (std::uint64_t i = 0; i < confirmed; ++i)
        ASSERT_TRUE(seen.records.contains(key_of(i))) << round << " " << call << " " << i;
      if (!died) break;
    }
  }
}

TEST(Log, FullDiskAtEveryCallLosesNothingThatWasConfirmed) {
  for (std::uint64_t call = 0;; ++call) {
    FaultFileSystem files;
    LogWriter writer = writer_on(files, 5);
    files.fail_at(call);
    std::uint64_t confirmed = 0, appended = 0;
    bool failed = false;
    try {
      for (int sync = 0; sync < 3; ++sync) {
        append(writer, range(appended, appended + 2), true);
        appended += 2;
        writer.sync();
        confirmed = appended;
      }
    } catch (const StoreError&) {
      failed = true;
    }
    for (const std::string& path : files.paths()) {
      const Read seen = read(files.content(path));
      ASSERT_EQ(seen.scan.damage_count, 0u) << call;
      ASSERT_TRUE(all_right(seen));
      for (std::uint64_t i = 0; i < confirmed; ++i) ASSERT_TRUE(seen.records.contains(key_of(i)));
    }
    if (!failed) break;
  }
}

// Every reader of bytes must survive every byte: random damage of many kinds, always the same.
TEST(Log, RandomDamageNeverGivesAWrongValue) {
  std::mt19937_64 random(11);
  const SmallLog logs[] = {small_log(true, true), small_log(false, false)};
  for (int round = 0; round < 4000; ++round) {
    Bytes bytes = logs[round % 2].bytes;
    for (std::uint64_t n = 1 + random() % 4; n > 0 && !bytes.empty(); --n) {
      const std::size_t at = random() % bytes.size();
      const std::size_t size = std::min<std::size_t>(1 + random() % 80, bytes.size() - at);
      const auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(at);
      const auto end = begin + static_cast<std::ptrdiff_t>(size);
      switch (random() % 5) {
        case 0:
          *begin = static_cast<unsigned char>(random());
          break;
        case 1:
          std::fill(begin, end, 0);
          break;
        case 2:
          bytes.erase(begin, end);
          break;
        case 3:
          bytes.insert(begin, bytes.begin(), bytes.begin() + 32);
          break;
        default:
          std::copy(bytes.end() - 32, bytes.end(), bytes.begin() + 32 * (random() % 4));
      }
    }
    ASSERT_TRUE(all_right(read(bytes))) << round;
  }
}

}  // namespace
}  // namespace fusedpo
