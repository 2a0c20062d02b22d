// Copies, and what a stream says of itself.
#include "cuda/stream.h"

#include <stdexcept>

#include "token_scores.h"

namespace fusedpo {
namespace {

TEST(StreamFunctions, CopyAndVersions) {
  DeviceArray<int> device(std::vector<int>{1, 2, 3, 4, 5});
  const cuda_host::LaunchLog log;
  int host[5] = {};
  cuda::copy_to_host(host, device.data(), sizeof host, kStream);
  EXPECT_EQ(std::vector<int>(host, host + 5), (std::vector<int>{1, 2, 3, 4, 5}));
  ASSERT_EQ(log.launches().size(), 1u);
  EXPECT_EQ(log.launches()[0].stream, kStream);
  EXPECT_GE(cuda::runtime_version(), 12000);
  EXPECT_GE(cuda::driver_version(), cuda::runtime_version());
}

TEST(StreamFunctions, UnderCaptureNothingMayWait) {
  EXPECT_FALSE(cuda::is_capturing(kStream));
  cuda_host::set_capturing(kStream, true);
  EXPECT_TRUE(cuda::is_capturing(kStream));
  EXPECT_FALSE(cuda::is_capturing(nullptr));
  DeviceArray<int> device(std::vector<int>{7});
  int host = 0;
  EXPECT_THROW(cuda::copy_to_host(&host, device.data(), sizeof host, kStream), std::runtime_error);
  EXPECT_EQ(host, 0);
  cuda_host::set_capturing(kStream, false);
  cuda::copy_to_host(&host, device.data(), sizeof host, kStream);
  EXPECT_EQ(host, 7);
}

}  // namespace
}  // namespace fusedpo
