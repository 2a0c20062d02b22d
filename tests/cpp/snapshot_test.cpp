// The snapshot: every bit is covered, and what is wrong is reported, never returned.
#include "store/snapshot.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>

#include "store/snapshot_writer.h"
#include "store/verify.h"
#include "store_cases.h"

namespace fusedpo {
namespace {

std::vector<std::uint64_t> sorted_ids(std::uint64_t n) {
  std::vector<std::uint64_t> ids = range(0, n);
  std::sort(ids.begin(), ids.end(),
            [](std::uint64_t a, std::uint64_t b) { return key_of(a) < key_of(b); });
  return ids;
}

// Records 0..n-1, every third with token values; room was planned for `extra` more.
std::string write(FaultFileSystem& files, std::uint64_t n, std::uint64_t extra = 0,
                  bool tokens = true) {
  SnapshotWriter writer(files, "s", test_identity(), n + extra, tokens ? 20 * (n + extra) : 0);
  for (const std::uint64_t i : sorted_ids(n)) {
    const bool has = tokens && i % 3 == 0;
    const std::vector<float> values = tokens_of(i);
    writer.add({key_of(i), logp_of(i), num_tokens_of(i), has}, has ? values.data() : nullptr);
  }
  return writer.finish();
}

std::string error_of(FaultFileSystem& files, const std::string& path) {
  try {
    Snapshot snapshot(files, path, test_identity());
    return "";
  } catch (const StoreError& e) {
    return name(e.code);
  }
}

TEST(Snapshot, GivesBackWhatWasAdded) {
  FaultFileSystem files;
  const std::string name = write(files, 500);
  const Snapshot snapshot(files, "s/" + name, test_identity());
  ASSERT_EQ(snapshot.size(), 500u);
  for (std::uint64_t i = 0; i < 600; ++i) {
    unsigned char key[16];
    key_of(i).store(key);
    std::int64_t row = 0;
    snapshot.find(key, 1, &row);
    if (i >= 500) {
      EXPECT_EQ(row, -1);
      continue;
    }
    ASSERT_GE(row, 0);
    const Record record = snapshot.at(static_cast<std::uint64_t>(row));
    EXPECT_EQ(record.logp, logp_of(i));
    EXPECT_EQ(record.num_tokens, num_tokens_of(i));
    ASSERT_EQ(record.has_tokens, i % 3 == 0);
    if (!record.has_tokens) continue;
    std::vector<float> values(record.num_tokens);
    snapshot.read_tokens(static_cast<std::uint64_t>(row), record, values.data());
    EXPECT_EQ(values, tokens_of(i));
  }
}

TEST(Snapshot, BytesDependOnTheContentOnly) {
  FaultFileSystem a, b;
  const std::string name = write(a, 100);
  EXPECT_EQ(name, write(b, 100, 1000));  // columns had to move
  EXPECT_EQ(a.content("s/" + name), b.content("s/" + name));
}

TEST(Snapshot, ColumnsAreAlignedAndTheHeaderTellsThem) {
  FaultFileSystem files;
  const Bytes& bytes = files.content("s/" + write(files, 10));
  const SnapshotLayout layout(test_identity(), 10, [] {
    std::uint64_t n = 0;
    for (std::uint64_t i = 0; i < 10; i += 3) n += num_tokens_of(i);
    return n;
  }());
  EXPECT_EQ(bytes.size(), layout.size);
  EXPECT_EQ(layout.keys % 4096, 0u);
  EXPECT_EQ(layout.logps % 8, 0u);
  EXPECT_EQ(layout.token_offsets % 8, 0u);
  EXPECT_EQ(layout.num_tokens % 4, 0u);
  EXPECT_EQ(std::string(bytes.begin() + 8, bytes.begin() + 8 + 20), R"({"__metadata__":{"fo)");
}

TEST(Snapshot, CutAtEveryByteIsDamage) {
  FaultFileSystem files;
  const Bytes whole = files.content("s/" + write(files, 7));
  for (std::size_t cut = 0; cut < whole.size(); ++cut) {
    FaultFileSystem one;
    one.put("s/x", Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(cut)));
    ASSERT_EQ(error_of(one, "s/x"), "damaged") << cut;
  }
  FaultFileSystem longer;
  longer.put("s/x", whole);
  longer.content("s/x").push_back(0);
  EXPECT_EQ(error_of(longer, "s/x"), "damaged");
}

TEST(Snapshot, EveryFlippedBitIsReportedAndNoValueIsWrong) {
  FaultFileSystem written;
  const std::string name = write(written, 5);
  const Bytes whole = written.content("s/" + name);
  for (std::size_t bit = 0; bit < 8 * whole.size(); ++bit) {
    Bytes bytes = whole;
    bytes[bit / 8] ^= static_cast<unsigned char>(1u << (bit % 8));
    FaultFileSystem files;
    files.put("s/" + name, std::move(bytes));
    std::string opened;
    try {
      const Store store(files, "s", test_identity());
      const auto view = store.view();
      for (std::uint64_t i = 0; i < 6; ++i) {
        try {
          const Seen seen = look(*view, i);
          ASSERT_NE(seen, Seen::kWrong) << bit;
          // Neither lost in silence, nor without its token values.
          ASSERT_EQ(seen, i == 5       ? Seen::kAbsent
                          : i % 3 == 0 ? Seen::kTokens
                                       : Seen::kPlain)
              << bit;
        } catch (const StoreError& e) {
          ASSERT_EQ(e.code, StoreCode::kDamaged) << bit;
        }
      }
    } catch (const StoreError& e) {
      opened = fusedpo::name(e.code);
    }
    const VerifyReport report = verify_store(files, "s", test_identity(), 10, 1 << 20);
    ASSERT_GT(report.problem_count, 0u) << bit;
    ASSERT_LE(report.records, 5u) << bit;
  }
}

TEST(Snapshot, RandomDamageNeverGivesAWrongValue) {
  FaultFileSystem written;
  const std::string name = write(written, 40);
  const Bytes whole = written.content("s/" + name);
  std::mt19937_64 random(3);
  for (int round = 0; round < 1500; ++round) {
    Bytes bytes = whole;
    for (std::uint64_t n = 1 + random() % 3; n > 0 && !bytes.empty(); --n) {
      // Half of the damage to the text of the header, which decides what is read where.
      const std::size_t at = random() % (random() % 2 == 0 ? bytes.size() : 1200) % bytes.size();
      const std::size_t size = std::min<std::size_t>(1 + random() % 40, bytes.size() - at);
      const auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(at);
      const auto end = begin + static_cast<std::ptrdiff_t>(size);
      switch (random() % 4) {
        case 0:
          *begin = static_cast<unsigned char>(random());
          break;
        case 1:
          std::fill(begin, end, static_cast<unsigned char>('0' + random() % 10));
          break;
        case 2:
          bytes.erase(begin, end);
          break;
        default:
          bytes.insert(begin, size, static_cast<unsigned char>('9'));
      }
    }
    FaultFileSystem files;
    files.put("s/" + name, std::move(bytes));
    try {
      const Store store(files, "s", test_identity());
      for (std::uint64_t i = 0; i < 40; ++i) ASSERT_NE(look(*store.view(), i), Seen::kWrong);
    } catch (const StoreError&) {
    }
  }
}

TEST(Snapshot, FilesOfOthersAreRefusedByName) {
  FaultFileSystem files;
  const std::string path = "s/" + write(files, 5);
  const Bytes whole = files.content(path);
  const auto with = [&](const std::string& from, const std::string& to) {
    Bytes bytes = whole;
    const auto at = std::search(bytes.begin(), bytes.end(), from.begin(), from.end());
    EXPECT_NE(at, bytes.end());
    std::copy(to.begin(), to.end(), at);
    FaultFileSystem one;
    one.put("s/x", bytes);
    return error_of(one, "s/x");
  };
  EXPECT_EQ(with(R"("version":"1")", R"("version":"2")"), "future_version");
  EXPECT_EQ(with("fusedpo reference", "someone's weights"), "bad_magic");
  const StoreIdentity other = make_identity("{}", 1e-6);
  EXPECT_THROW(Snapshot(files, path, other), StoreError);
  try {
    Snapshot(files, path, other);
  } catch (const StoreError& e) {
    EXPECT_EQ(e.code, StoreCode::kIdentity);
  }
}

// Keys that are no hashes: the search must find them all the same.
TEST(Snapshot, FindsKeysOfEveryDistribution) {
  std::mt19937_64 random(5);
  const std::vector<std::function<Key(std::uint64_t)>> makers = {
      [](std::uint64_t i) { return Key{0, i}; },
      [](std::uint64_t i) { return Key{~std::uint64_t{0}, i}; },
      [](std::uint64_t i) { return Key{i * i * i, i}; },
      [](std::uint64_t i) { return Key{std::uint64_t{1} << (i % 64), i}; },
      [](std::uint64_t i) { return i == 0 ? Key{0, 0} : Key{~std::uint64_t{0} - i, 7}; },
      [&](std::uint64_t) { return Key{random(), random()}; },
  };
  for (const auto& maker : makers) {
    for (const std::uint64_t n : {1, 2, 3, 33, 1000}) {
      std::vector<Key> keys;
      for (std::uint64_t i = 0; i < n; ++i) keys.push_back(maker(i));
      std::sort(keys.begin(), keys.end());
      keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
      FaultFileSystem files;
      SnapshotWriter writer(files, "s", test_identity(), keys.size(), 0);
      for (const Key& key : keys) writer.add({key, -1, 1, false}, nullptr);
      const Snapshot snapshot(files, "s/" + writer.finish(), test_identity());
      std::vector<unsigned char> wanted;
      const auto want = [&](const Key& key) {
        wanted.resize(wanted.size() + 16);
        key.store(wanted.data() + wanted.size() - 16);
      };
      for (const Key& key : keys) {
        want(key);
        want({key.high, key.low + 1});
        want({key.high - 1, key.low});
      }
      std::vector<std::int64_t> rows(wanted.size() / 16);
      snapshot.find(wanted.data(), rows.size(), rows.data());
      for (std::size_t j = 0; j < rows.size(); ++j) {
        const Key key = Key::load(wanted.data() + 16 * j);
        const auto it = std::lower_bound(keys.begin(), keys.end(), key);
        ASSERT_EQ(rows[j], it != keys.end() && *it == key ? it - keys.begin() : -1) << n;
      }
    }
  }
}

}  // namespace
}  // namespace fusedpo
