// Merging: nothing is lost or made up, whenever it dies and whoever else is at work.
#include "store/merge.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

#include "store/sorted_records.h"
#include "store_cases.h"

namespace fusedpo {
namespace {

MergeReport merge(FaultFileSystem& files, bool abandoned = false, std::uint64_t memory = 1 << 20) {
  MergeOptions options;
  options.abandoned = abandoned;
  options.memory_bytes = memory;
  return merge_store(files, "s", test_identity(), options);
}

void write_log(FaultFileSystem& files, std::uint64_t id, const std::vector<std::uint64_t>& ids,
               bool tokens = false, bool close = true) {
  LogWriter writer = writer_on(files, id);
  append(writer, ids, tokens);
  close ? writer.close() : writer.sync();
}

// A log with one record of a value of its own.
void write_value(FaultFileSystem& files, std::uint64_t id, double logp, std::uint32_t num_tokens,
                 std::vector<float> tokens = {}) {
  LogWriter writer = writer_on(files, id);
  std::vector<unsigned char> key(16);
  key_of(0).store(key.data());
  const std::vector<double> logps = {logp};
  const std::vector<std::uint32_t> lengths = {num_tokens};
  writer.append({key, logps, lengths, tokens, !tokens.empty()});
  writer.close();
}

void expect_records(FaultFileSystem& files, const std::vector<std::uint64_t>& ids, Seen as) {
  const Store store(files, "s", test_identity());
  EXPECT_EQ(store.view()->size(), ids.size());
  for (const std::uint64_t i : ids) EXPECT_EQ(look(*store.view(), i), as) << i;
}

Bytes only_file(FaultFileSystem& files) {
  EXPECT_EQ(files.paths().size(), 1u);
  return files.content(files.paths().at(0));
}

TEST(Merge, OfSeveralLogsAndSnapshotsGivesOneSnapshot) {
  FaultFileSystem files;
  write_log(files, 1, range(0, 100));
  merge(files);
  write_log(files, 2, range(50, 200));
  write_log(files, 3, range(150, 300));
  const MergeReport report = merge(files);
  EXPECT_EQ(report.records, 300u);
  EXPECT_EQ(files.paths().size(), 1u);
  expect_records(files, range(0, 300), Seen::kPlain);
}

TEST(Merge, GivesTheSameBytesWhoeverWroteWhatAndWhen) {
  FaultFileSystem one, many;
  write_log(one, 1, range(0, 300), true);
  merge(one);
  std::vector<std::uint64_t> reversed = range(0, 300);
  std::reverse(reversed.begin(), reversed.end());
  write_log(many, 5, range(100, 220), true);
  write_log(many, 6, range(0, 110), true);
  merge(many);
  write_log(many, 7, reversed, true);
  write_log(many, 8, range(0, 300), false);  // values with tokens win
  merge(many);
  EXPECT_EQ(only_file(one), only_file(many));
}

TEST(Merge, InLittleMemoryGivesTheSameBytes) {
  FaultFileSystem reference;
  write_log(reference, 1, range(0, 2000), true);
  merge(reference);
  for (const std::uint64_t memory : {1u, 3000u, 20000u}) {
    FaultFileSystem files;
    write_log(files, 1, range(0, 1200), true);
    write_log(files, 2, range(700, 2000), true);
    merge(files, false, memory);
    EXPECT_EQ(only_file(reference), only_file(files)) << memory;
  }
}

// Keys that are no hashes, and one key many times: the guess of the range fails, the result not.
TEST(Merge, OfSkewedKeysInLittleMemoryLosesNothing) {
  FaultFileSystem files;
  LogWriter writer = writer_on(files, 1);
  std::vector<unsigned char> keys;
  for (std::uint64_t i = 0; i < 1000; ++i) {
    keys.resize(keys.size() + 16);
    Key{i < 500 ? 0 : ~std::uint64_t{0}, i % 2 == 0 ? i : 5000}.store(keys.data() + 16 * i);
  }
  const std::vector<double> logps(1000, -1);
  const std::vector<std::uint32_t> lengths(1000, 2);
  writer.append({keys, logps, lengths, {}, false});
  writer.close();
  EXPECT_EQ(merge(files, false, 1).records, 502u);
}

TEST(Merge, OfAnUnchangedStoreChangesNothing) {
  FaultFileSystem files;
  write_log(files, 1, range(0, 10));
  const std::string name = merge(files).snapshot;
  const MergeReport again = merge(files);
  EXPECT_EQ(again.snapshot, name);
  EXPECT_EQ(again.records, 10u);
  EXPECT_TRUE(again.removed.empty());
  write_log(files, 2, range(0, 10));  // everything once more
  EXPECT_EQ(merge(files).snapshot, name);
  EXPECT_EQ(files.paths().size(), 1u);
}

TEST(Merge, OfAnEmptyStoreWritesNothing) {
  FaultFileSystem files;
  EXPECT_EQ(merge(files).snapshot, "");
  EXPECT_TRUE(files.paths().empty());
}

std::string message_of(FaultFileSystem& files, StoreCode expected) {
  try {
    merge(files);
    ADD_FAILURE() << "no error";
  } catch (const StoreError& e) {
    EXPECT_EQ(e.code, expected) << e.what();
    return e.what();
  }
  return "";
}

TEST(Merge, ContradictionsAreErrorsWithBothValuesAndChangeNothing) {
  FaultFileSystem files;
  write_value(files, 1, -100, 5);
  write_value(files, 2, -100.001, 5);
  const auto before = files.paths();
  const std::string message = message_of(files, StoreCode::kContradiction);
  EXPECT_NE(message.find("-100 "), std::string::npos) << message;
  EXPECT_NE(message.find("-100.001"), std::string::npos) << message;
  EXPECT_EQ(files.paths(), before);
  const VerifyReport report = verify_store(files, "s", test_identity(), 10, 1 << 20);
  EXPECT_EQ(report.problem_count, 1u);
  EXPECT_NE(report.problems.at(0).what.find("-100.001"), std::string::npos);
  const Store store(files, "s", test_identity());
  EXPECT_THROW(look(*store.view(), 0), StoreError);
}

TEST(Merge, OtherNumbersOfTokensAreContradictions) {
  FaultFileSystem files;
  write_value(files, 1, -100, 5);
  write_value(files, 2, -100, 6);
  message_of(files, StoreCode::kContradiction);
}

TEST(Merge, TokenValuesAreHeldToTheirOwnSizeNotToTheSums) {
  // 2 nats are within the tolerance of a sum of -5e6, not of a token's -1.
  FaultFileSystem files;
  write_value(files, 1, -5e6, 2, {-1, -5e6f + 1});
  write_value(files, 2, -5e6, 2, {-3, -5e6f + 3});
  message_of(files, StoreCode::kContradiction);
}

TEST(Merge, TheToleranceIsRelativeAboveTheFloorAndAbsoluteBelow) {
  EXPECT_TRUE(agree(-500, -495.1, 1e-2));
  EXPECT_FALSE(agree(-500, -494.9, 1e-2));
  EXPECT_TRUE(agree(0, -0.31, 1e-2));
  EXPECT_FALSE(agree(0, -0.33, 1e-2));
}

TEST(Merge, OtherTokenValuesAreContradictions) {
  FaultFileSystem files;
  write_value(files, 1, -3, 2, {-1, -2});
  write_value(files, 2, -3, 2, {-2, -1});
  message_of(files, StoreCode::kContradiction);
}

TEST(Merge, ValuesWithinTheToleranceCollapseToTheSameWinnerInEveryOrder) {
  // Close to 0 the tolerance is absolute: 0 and -1e-7 are sums of larger numbers, rounded.
  for (const auto& [a, b] :
       std::vector<std::pair<double, double>>{{-100, -100.00005}, {0, -1e-7}, {-1e-9, -2e-9}}) {
    FaultFileSystem first, second;
    write_value(first, 1, a, 5);
    write_value(first, 2, b, 5);
    write_value(second, 1, b, 5);
    merge(second);
    write_value(second, 2, a, 5);
    {
      const Store store(first, "s", test_identity());
      unsigned char key[16];
      key_of(0).store(key);
      Record record;
      store.view()->lookup(key, 1, &record);
      EXPECT_EQ(record.logp, std::min(a, b));  // before the merge as after it
    }
    merge(first);
    merge(second);
    EXPECT_EQ(only_file(first), only_file(second));
  }
}

TEST(Merge, AndLookupAgreeOnValuesOfWhichOnlyTheOutermostContradict) {
  FaultFileSystem files;
  write_value(files, 1, -100, 2, {-40, -60});  // with token values: the best one
  merge(files);                                // in a snapshot: the first one
  write_value(files, 2, -100.00009, 2);
  write_value(files, 3, -99.99991, 2);
  const Store store(files, "s", test_identity());
  try {
    look(*store.view(), 0);
    ADD_FAILURE() << "no error";
  } catch (const StoreError& e) {
    EXPECT_EQ(e.code, StoreCode::kContradiction) << e.what();
    EXPECT_NE(std::string(e.what()).find("-100.00009"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("-99.99991"), std::string::npos) << e.what();
  }
  message_of(files, StoreCode::kContradiction);
}

TEST(Merge, KeepsTheLogsOfWritersThatMayBeAlive) {
  FaultFileSystem files;
  LogWriter alive = writer_on(files, 1);
  append(alive, range(0, 5));
  alive.sync();
  write_log(files, 2, range(5, 10));
  const MergeReport report = merge(files);
  EXPECT_EQ(report.records, 10u);
  ASSERT_EQ(report.kept_logs.size(), 1u);
  append(alive, range(10, 15));
  alive.close();
  expect_records(files, range(0, 15), Seen::kPlain);
  EXPECT_TRUE(merge(files).kept_logs.empty());
  EXPECT_EQ(files.paths().size(), 1u);
  expect_records(files, range(0, 15), Seen::kPlain);
}

TEST(Merge, OfAbandonedLogsMakesALivingWriterFailInsteadOfLosingWhatItConfirms) {
  FaultFileSystem files;
  LogWriter alive = writer_on(files, 1);
  append(alive, range(0, 5));
  alive.sync();
  append(alive, range(5, 9));
  const MergeReport report = merge(files, true);
  EXPECT_EQ(report.records, 5u);
  EXPECT_EQ(files.paths().size(), 1u);
  try {
    alive.sync();
    ADD_FAILURE() << "confirmed records that are gone";
  } catch (const StoreError& e) {
    EXPECT_EQ(e.code, StoreCode::kTaken);
  }
  expect_records(files, range(0, 5), Seen::kPlain);
}

TEST(Merge, RefusesDamageAndChangesNothing) {
  FaultFileSystem files;
  write_log(files, 1, range(0, 5));
  write_log(files, 2, range(5, 10));
  files.content(files.paths().at(0))[70] ^= 1;
  const auto before = files.paths();
  message_of(files, StoreCode::kDamaged);
  EXPECT_EQ(files.paths(), before);
  const VerifyReport report = verify_store(files, "s", test_identity(), 10, 1 << 20);
  EXPECT_EQ(report.records, 9u);  // the others are still counted
  ASSERT_EQ(report.problem_count, 1u);
  EXPECT_EQ(report.problems.at(0).offset, 64u);
}

TEST(Prune, KeepsOnlyWhatIsWanted) {
  FaultFileSystem files;
  write_log(files, 1, range(0, 50), true);
  MergeOptions options;
  const std::set<Key> wanted = {key_of(3), key_of(40), key_of(77)};
  options.keep = [&](const Key& key) { return wanted.contains(key); };
  EXPECT_EQ(merge_store(files, "s", test_identity(), options).records, 2u);
  expect_records(files, {3, 40}, Seen::kTokens);
  LogWriter alive = writer_on(files, 2);
  append(alive, {5});
  alive.sync();
  EXPECT_THROW(merge_store(files, "s", test_identity(), options), StoreError);
}

void fill(FaultFileSystem& files) {
  write_log(files, 1, range(0, 20), true);
  merge(files);
  write_log(files, 2, range(10, 30), true);
  write_log(files, 3, range(25, 40), true);
  write_log(files, 4, range(40, 45), true, false);  // killed
}

// The process, or the whole machine, dies at every single call of a merge.
TEST(Merge, DeathAtEveryCallLosesNothingAndTheNextMergeGivesTheSameBytes) {
  for (const bool abandoned : {false, true}) {
    FaultFileSystem uninterrupted;
    fill(uninterrupted);
    merge(uninterrupted, true);
    const Bytes expected = only_file(uninterrupted);
    std::mt19937_64 random(9);
    bool died = true;
    std::uint64_t deaths = 0;
    for (std::uint64_t call = 0; died; ++call) {
      for (const bool power_cut : {false, true}) {
        FaultFileSystem files;
        fill(files);
        files.sync_directory("s");
        files.revive();
        files.die_at(call);
        died = false;
        try {
          merge(files, abandoned, 2000);
        } catch (const StoreError&) {
          died = true;
          ++deaths;
        }
        power_cut ? files.crash(random) : files.revive();
        expect_records(files, range(0, 45), Seen::kTokens);
        const VerifyReport report = verify_store(files, "s", test_identity(), 10, 1 << 20);
        ASSERT_EQ(report.problem_count, 0u) << call;
        ASSERT_EQ(report.records, 45u) << call;
        merge(files, true);
        ASSERT_EQ(only_file(files), expected) << call;
      }
    }
    EXPECT_GT(deaths, 40u);
  }
}

TEST(Merge, FullDiskOrFailedSyncAtEveryCallLosesNothing) {
  for (std::uint64_t call = 0;; ++call) {
    FaultFileSystem files;
    fill(files);
    files.revive();
    files.fail_at(call);
    bool failed = false;
    try {
      merge(files);
    } catch (const StoreError&) {
      failed = true;
    }
    files.revive();
    expect_records(files, range(0, 45), Seen::kTokens);
    if (!failed) break;
  }
  FaultFileSystem files;
  fill(files);
  files.fail_syncs(true);
  EXPECT_THROW(merge(files), StoreError);
  std::mt19937_64 random(2);
  files.crash(random);
  expect_records(files, range(0, 45), Seen::kTokens);
}

TEST(Identity, IsCreatedWholeOrNotAtAllAtEveryCall) {
  const Bytes text(3000, 'x');
  std::mt19937_64 random(4);
  bool died = true;
  for (std::uint64_t call = 0; died; ++call) {
    for (int round = 0; round < 8; ++round) {
      FaultFileSystem files;
      files.die_at(call);
      died = false;
      try {
        EXPECT_TRUE(create_atomically(files, "s", "identity.json", text));
      } catch (const StoreError&) {
        died = true;
      }
      files.crash(random);
      bool there = false;
      for (const std::string& path : files.paths()) {
        if (path != "s/identity.json") continue;
        there = true;
        ASSERT_EQ(files.content(path), text) << call;
      }
      if (!died) {
        EXPECT_TRUE(there);
        EXPECT_FALSE(create_atomically(files, "s", "identity.json", Bytes(5, 'y')));
        EXPECT_EQ(files.content("s/identity.json"), text);
      }
    }
  }
}

}  // namespace
}  // namespace fusedpo
