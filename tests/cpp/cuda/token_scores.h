// Runs token_logps on the emulated device and collects all it writes.
#pragma once

#include <gtest/gtest.h>

#include "cuda/token_logps.h"
#include "cuda_host.h"
#include "device_array.h"
#include "row_cases.h"

namespace fusedpo {

inline const auto kStream = reinterpret_cast<cuda::Stream>(0x5712ea);

// Everything the kernel writes, by position.
struct Scores {
  std::vector<double> logps, entropy, log_sum_sq_probs, mean_logits, stats;
  std::vector<uint8_t> is_top1;
  std::vector<std::vector<char>> bytes;
};

inline Scores score(const TypedRows& logits, const std::vector<int64_t>& labels, double temperature,
                    unsigned metrics, uint64_t seed, int64_t ignore_index = kIgnore) {
  const DType result = result_of(logits.view.type);
  const size_t n = labels.size();
  const DeviceArray<int64_t> y(labels);
  TypedArray logps(result, n), entropy(result, n), sum_sq(result, n), mean(result, n),
      stats(result, 3 * n);
  DeviceArray<uint8_t> top1(n);
  cuda::RowOutputs out;
  out.logps = logps.data();
  if (metrics & kEntropy) out.entropy = entropy.data();
  if (metrics & kLogSumSqProbs) out.log_sum_sq_probs = sum_sq.data();
  if (metrics & kMeanLogits) out.mean_logits = mean.data();
  if (metrics & kIsTop1) out.is_top1 = reinterpret_cast<bool*>(top1.data());
  cuda_host::set_seed(seed);
  const cuda_host::LaunchLog log;
  cuda::token_logps(logits.view, y.data(), ignore_index, temperature, metrics, out, stats.data(),
                    kStream);
  EXPECT_EQ(log.launches().size(), n == 0 ? 0u : 1u);
  for (const auto& launch : log.launches()) EXPECT_EQ(launch.stream, kStream);
  return {logps.host(),
          entropy.host(),
          sum_sq.host(),
          mean.host(),
          stats.host(),
          top1.host(),
          {logps.bytes(), entropy.bytes(), sum_sq.bytes(), mean.bytes(), stats.bytes()}};
}

inline std::vector<int64_t> labels_of(const std::vector<RowCase>& cases) {
  std::vector<int64_t> labels;
  for (const RowCase& row : cases) labels.push_back(row.label);
  return labels;
}

inline std::vector<std::vector<double>> values_of(const std::vector<RowCase>& cases) {
  std::vector<std::vector<double>> values;
  for (const RowCase& row : cases) values.push_back(row.x);
  return values;
}

// The definition within `bound`, and the CPU kernels within twice that and what they themselves
// lose in sums of up to 256 values.
inline void expect_near(DType type, double got, long double want, double bound, double cpu,
                        const Truth& truth, const std::string& what) {
  if (!std::isfinite(want)) {
    EXPECT_EQ(got, static_cast<double>(want)) << what;
    EXPECT_EQ(got, cpu) << what << ", CPU";
    return;
  }
  double largest = 0.0;
  for (const long double z : truth.z) {
    if (std::isfinite(z)) largest = std::max(largest, static_cast<double>(std::fabs(z)));
  }
  const double of_cpu = 8.0 * ulp(result_of(type), largest);
  EXPECT_LE(distance(got, want), bound)
      << what << ": got " << got << ", want " << static_cast<double>(want);
  EXPECT_LE(distance(got, cpu), 2 * bound + of_cpu) << what << ": got " << got << ", CPU " << cpu;
}

}  // namespace fusedpo
