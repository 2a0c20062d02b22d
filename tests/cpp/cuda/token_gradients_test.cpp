// token_logps_backward on the emulated device against the definition and the CPU kernels.
#include "token_scores.h"

namespace fusedpo {
namespace {

struct Upstream {
  std::vector<double> logps, entropy;  // by position; 0 for some
};

Upstream upstream(DType type, size_t n, unsigned seed) {
  Upstream up{random_values(result_of(type), n, 1.0, seed),
              random_values(result_of(type), n, 0.5, seed + 1)};
  up.logps[1] = up.entropy[2] = 0.0;
  up.logps[3] = up.entropy[3] = 0.0;  // nothing comes to this row
  return up;
}

enum class Wanted { kLogps, kEntropy, kBoth };

// Writes to `out`, which may be the logits.
void differentiate(const TypedRows& logits, const std::vector<int64_t>& labels, double temperature,
                   const Scores& scores, const Upstream& up, Wanted wanted, uint64_t seed,
                   const cuda::RowsView& out) {
  const DType result = result_of(logits.view.type);
  const DeviceArray<int64_t> y(labels);
  const TypedArray of_logps(result, up.logps), of_entropy(result, up.entropy);
  const TypedArray entropy(result, scores.entropy), stats(result, scores.stats);
  cuda_host::set_seed(seed);
  const cuda_host::LaunchLog log;
  cuda::token_logps_backward(logits.view, y.data(), kIgnore, temperature,
                             wanted == Wanted::kEntropy ? nullptr : of_logps.data(),
                             wanted == Wanted::kLogps ? nullptr : of_entropy.data(),
                             wanted == Wanted::kLogps ? nullptr : entropy.data(), stats.data(), out,
                             kStream);
  EXPECT_EQ(log.launches().size(), labels.empty() ? 0u : 1u);
  for (const auto& launch : log.launches()) EXPECT_EQ(launch.stream, kStream);
}

class TokenGradients : public testing::TestWithParam<DType> {
 protected:
  void TearDown() override { cuda_host::set_seed(0); }
  const DType type = GetParam();
};

void expect_gradients(DType type, const TypedRows& logits, const TypedRows& got,
                      const std::vector<RowCase>& cases, double temperature, const Scores& scores,
                      const Upstream& up, Wanted wanted, const std::string& where) {
  const LogitTransform transform{1.0, 0.0, temperature};
  for (size_t i = 0; i < cases.size(); ++i) {
    const RowCase& row = cases[i];
    const std::string what = where + ", " + row.name + ", column ";
    const size_t vocab = row.x.size();
    RowGradient g{};
    g.max = scores.stats[3 * i];
    g.log_sum = scores.stats[3 * i + 1];
    g.rest_share = scores.stats[3 * i + 2];
    g.grad_logp = wanted == Wanted::kEntropy ? 0.0 : up.logps[i];
    g.grad_entropy = wanted == Wanted::kLogps ? 0.0 : up.entropy[i];
    g.entropy = wanted == Wanted::kLogps ? 0.0 : scores.entropy[i];
    const bool nothing = g.grad_logp == 0.0 && g.grad_entropy == 0.0;
    if (row.label == kIgnore || nothing) {
      for (size_t v = 0; v < vocab; ++v) EXPECT_EQ(got.get(i, v), 0.0) << what << v;
      continue;
    }
    if (!row.scored || !row.number) {
      for (size_t v = 0; v < vocab; ++v) EXPECT_TRUE(std::isnan(got.get(i, v))) << what << v;
      continue;
    }
    if (row.large) continue;  // rounding the logits themselves is all there is to see
    const auto y = static_cast<size_t>(row.label);
    const GradientTruth want(type, Truth(row.x, y, transform), y, g);
    // In the CPU kernel's view the row is not overwritten yet.
    const auto cpu = cpu_gradient(type, logits.row(i), vocab, row.label, g, transform);
    for (size_t v = 0; v < vocab; ++v) {
      EXPECT_LE(distance(got.get(i, v), want.value[v]), want.bound[v])
          << what << v << ": got " << got.get(i, v) << ", want "
          << static_cast<double>(want.value[v]);
      EXPECT_LE(distance(got.get(i, v), cpu[v]), 2.0 * want.bound[v])
          << what << v << ", CPU " << cpu[v];
    }
  }
}

TEST_P(TokenGradients, MatchTheDefinitionInEveryLayout) {
  unsigned seed = 100;
  for (const size_t vocab : kVocabs) {
    for (const Lie lie : kLies) {
      const auto cases = row_cases(type, vocab, ++seed);
      const auto labels = labels_of(cases);
      TypedRows rows(type, cases.size(), vocab, lie);
      rows.set(values_of(cases));
      const double temperature = seed % 2 == 0 ? 1.0 : 0.7;
      const Wanted wanted = static_cast<Wanted>(seed % 3);
      const Scores scores = score(rows, labels, temperature, kAllMetrics, seed);
      const Upstream up = upstream(type, cases.size(), seed);
      // Elsewhere in a layout of its own, so that the vectors of both do not match; then in place.
      TypedRows out(type, cases.size(), vocab, kLies[seed % 4]);
      differentiate(rows, labels, temperature, scores, up, wanted, seed, out.view);
      const std::string where = std::string(name_of(type)) + ", vocab " + std::to_string(vocab) +
                                ", layouts " + std::to_string(static_cast<int>(lie)) + " " +
                                std::to_string(seed % 4);
      expect_gradients(type, rows, out, cases, temperature, scores, up, wanted, where);
      if (vocab > 1001) continue;
      differentiate(rows, labels, temperature, scores, up, wanted, seed + 1, rows.view);
      for (size_t i = 0; i < cases.size(); ++i) {
        for (size_t v = 0; v < vocab; ++v) {
          EXPECT_EQ(distance(rows.get(i, v), out.get(i, v)), 0.0)
              << where << ", in place, " << i << " " << v;
        }
      }
    }
  }
}

TEST_P(TokenGradients, NoOrderOfThreadsAndBlocksChangesABit) {
  const auto cases = row_cases(type, 1001, 78);
  const auto labels = labels_of(cases);
  TypedRows rows(type, cases.size(), 1001, Lie::kPadded),
      want(type, cases.size(), 1001, Lie::kDense);
  rows.set(values_of(cases));
  const Scores scores = score(rows, labels, 1.0, kAllMetrics, 0);
  const Upstream up = upstream(type, cases.size(), 6);
  differentiate(rows, labels, 1.0, scores, up, Wanted::kBoth, 0, want.view);
  for (const uint64_t seed : {1, 2}) {
    TypedRows got(type, cases.size(), 1001, Lie::kDense);
    differentiate(rows, labels, 1.0, scores, up, Wanted::kBoth, seed, got.view);
    EXPECT_EQ(got.array.bytes(), want.array.bytes());
  }
}

TEST_P(TokenGradients, NoRowsAreNoLaunch) {
  TypedRows rows(type, 0, 9, Lie::kDense);
  const Scores scores = score(rows, {}, 1.0, kAllMetrics, 1);
  differentiate(rows, {}, 1.0, scores, {}, Wanted::kLogps, 1, rows.view);
}

INSTANTIATE_TEST_SUITE_P(Type, TokenGradients, testing::ValuesIn(kTypes),
                         [](const auto& param) { return std::string(name_of(param.param)); });

}  // namespace
}  // namespace fusedpo
