// BLAKE2b against published vectors, and record keys against Python's hashlib.
#include "store/blake2b.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "store/error.h"
#include "store/record_key.h"

namespace fusedpo {
namespace {

std::string hex_of(const unsigned char* bytes, std::size_t n) {
  std::string text;
  for (std::size_t i = 0; i < n; ++i) {
    constexpr char kDigits[] = "0123456789abcdef";
    text += kDigits[bytes[i] >> 4];
    text += kDigits[bytes[i] & 15];
  }
  return text;
}

std::string digest(std::string_view data, std::size_t size) {
  unsigned char bytes[64];
  Blake2b(size).update(data.data(), data.size()).finish(bytes);
  return hex_of(bytes, size);
}

TEST(Blake2b, GivesTheVectorOfRfc7693) {
  EXPECT_EQ(digest("abc", 64),
            "ba80a53f981c4d0d6a2797b69f12f6e94c212f14685ac4b74b12bb6fdbffa2d1"
            "7d87c5392aab792dc252d5de4533cc9518d38aa8dbf1925ab92386edd4009923");
}

TEST(Blake2b, GivesTheDigestsOfPythonsHashlib) {
  EXPECT_EQ(digest("", 16), "cae66941d9efbd404e4d88758ea67670");
  EXPECT_EQ(digest("abc", 16), "cf4ab791c62b8d2b2109c90275287816");
  EXPECT_EQ(digest("", 64),
            "786a02f742015903c6c6fd852552d272912f4740e15847618a86e217f71f5419"
            "d25e1031afee585313896444934eb04b903a685b1448b755d56f701afe9be2ce");
}

// All lengths around the block size of 128, chained into one digest.
TEST(Blake2b, GivesTheDigestsOfPythonsHashlibForEveryLength) {
  Blake2b all(16);
  std::vector<unsigned char> data;
  for (int n = 0; n <= 515; ++n) {
    const Digest one = blake2b_128(data.data(), data.size());
    all.update(one.data(), one.size());
    data.push_back(static_cast<unsigned char>(n * 7));
  }
  unsigned char bytes[16];
  all.finish(bytes);
  EXPECT_EQ(hex_of(bytes, 16), "096726ce1bc7f8431fca5b35fb816136");
}

TEST(Blake2b, DoesNotDependOnHowTheDataIsCut) {
  const std::string data(1000, 'x');
  for (std::size_t step = 1; step <= 300; step += 13) {
    Blake2b hash(16);
    for (std::size_t at = 0; at < data.size(); at += step)
      hash.update(data.data() + at, std::min(step, data.size() - at));
    Digest found;
    hash.finish(found.data());
    EXPECT_EQ(found, blake2b_128(data.data(), data.size())) << step;
  }
}

std::string key_hex(const std::vector<std::int64_t>& prompt,
                    const std::vector<std::int64_t>& completion) {
  const std::vector<std::int64_t> prompts = {0, static_cast<std::int64_t>(prompt.size())};
  const std::vector<std::int64_t> completions = {0, static_cast<std::int64_t>(completion.size())};
  unsigned char key[16];
  record_keys({prompt, prompts}, {completion, completions}, key);
  return hex_of(key, 16);
}

// The vectors of docs/store_format.md.
TEST(RecordKey, GivesThePublishedVectors) {
  EXPECT_EQ(key_hex({}, {0}), "5cf0479a381380026a05c1e7bc18bfbb");
  EXPECT_EQ(key_hex({1, 2, 3}, {4, 5}), "2c9046d32753ef133cf64632700a8652");
  EXPECT_EQ(key_hex({1, 2}, {3, 4, 5}), "2169142f34b96532a004f467739db89f");
  EXPECT_EQ(key_hex({151643}, {4294967295}), "9ed297829f184988a618e5628d0a8234");
}

TEST(RecordKey, RefusesWhatCannotBeScored) {
  const auto code = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const StoreError& e) {
      return name(e.code);
    }
    return "no error";
  };
  EXPECT_EQ(code([] { key_hex({1}, {}); }), "empty_completion");
  EXPECT_EQ(code([] { key_hex({1}, {-100}); }), "bad_value");
  EXPECT_EQ(code([] { key_hex({1}, {std::int64_t{1} << 32}); }), "bad_value");
  const std::vector<std::int64_t> ids = {1, 2, 3}, good = {0, 1}, descending = {2, 1}, far = {0, 4};
  unsigned char key[16];
  EXPECT_EQ(code([&] { record_keys({ids, descending}, {ids, good}, key); }), "bad_value");
  EXPECT_EQ(code([&] { record_keys({ids, good}, {ids, far}, key); }), "bad_value");
  EXPECT_EQ(code([&] { record_keys({ids, {}}, {ids, good}, key); }), "bad_value");
}

}  // namespace
}  // namespace fusedpo
