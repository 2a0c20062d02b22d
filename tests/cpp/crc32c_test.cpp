// CRC-32C against the published vectors of RFC 3720 B.4, and the properties the store relies on.
#include "store/crc32c.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

namespace fusedpo {
namespace {

std::uint32_t of(std::string_view bytes) { return crc32c(bytes.data(), bytes.size()); }

TEST(Crc32c, GivesTheVectorsOfRfc3720) {
  EXPECT_EQ(of(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(of(std::string(32, '\xff')), 0x62a8ab43u);
  std::string up, down;
  for (int i = 0; i < 32; ++i) {
    up.push_back(static_cast<char>(i));
    down.push_back(static_cast<char>(31 - i));
  }
  EXPECT_EQ(of(up), 0x46dd794eu);
  EXPECT_EQ(of(down), 0x113fdb5cu);
  const unsigned char iscsi_read[48] = {0x01, 0xc0, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
                                        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x14, 0x00, 0x00, 0x00,
                                        0x00, 0x00, 0x04, 0x00, 0x00, 0x00, 0x00, 0x14, 0x00, 0x00,
                                        0x00, 0x18, 0x28, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
                                        0x02, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00};
  EXPECT_EQ(crc32c(iscsi_read, sizeof iscsi_read), 0xd9963a56u);
}

TEST(Crc32c, GivesTheCheckValueOfTheDigits) { EXPECT_EQ(of("123456789"), 0xe3069283u); }

TEST(Crc32c, OfNothingIsZeroAndNeedsNoPointer) { EXPECT_EQ(crc32c(nullptr, 0), 0u); }

// Every split, because the eight-byte steps and the tail must meet at any offset and alignment.
TEST(Crc32c, ExtendsOverEverySplit) {
  const std::string text = "a record of fifty-one bytes, which is not 8 times n.";
  const std::uint32_t whole = of(text);
  for (std::size_t n = 0; n <= text.size(); ++n) {
    EXPECT_EQ(crc32c(text.data() + n, text.size() - n, crc32c(text.data(), n)), whole) << n;
  }
}

TEST(Crc32c, NoticesEverySingleFlippedBit) {
  std::string record(64, '\x5a');
  const std::uint32_t before = of(record);
  for (std::size_t bit = 0; bit < record.size() * 8; ++bit) {
    record[bit / 8] = static_cast<char>(record[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_NE(of(record), before) << bit;
    record[bit / 8] = static_cast<char>(record[bit / 8] ^ (1 << (bit % 8)));
  }
}

TEST(Crc32c, MaskIsUndoneAndChangesTheValue) {
  for (const std::uint32_t crc : {0u, 1u, 0xffffffffu, 0xe3069283u, 0x80000000u}) {
    EXPECT_EQ(unmask_crc32c(mask_crc32c(crc)), crc);
    EXPECT_NE(mask_crc32c(crc), crc);
    EXPECT_NE(mask_crc32c(mask_crc32c(crc)), crc);
  }
  EXPECT_EQ(mask_crc32c(0u), 0xa282ead8u);
}

}  // namespace
}  // namespace fusedpo
