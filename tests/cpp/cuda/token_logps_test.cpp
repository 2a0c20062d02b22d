// token_logps forward on the emulated device against the definitions and the CPU kernels.
#include <gtest/gtest.h>

#include "memory.h"
#include "token_scores.h"

namespace fusedpo {
namespace {

class TokenLogps : public testing::TestWithParam<DType> {
 protected:
  void TearDown() override { cuda_host::set_seed(0); }
  const DType type = GetParam();
};

// Of rows with ordinary and with large logits.
using ErrorsByScale = std::vector<PlainErrors>;

void include_errors(DType type, const std::vector<RowCase>& rows, double temperature,
                    ErrorsByScale* errors) {
  const LogitTransform transform{1.0, 0.0, temperature};
  for (const RowCase& row : rows) {
    if (!row.scored || !row.number) continue;
    const auto y = static_cast<size_t>(row.label);
    const Truth truth(row.x, y, transform);
    PlainErrors& e = (*errors)[row.large];
    if (type == DType::f64) {
      e.include(Plain<double>(row.x, y, transform), truth);
    } else {
      e.include(Plain<float>(row.x, y, transform), truth);
    }
  }
}

void expect_scores(DType type, const TypedRows& rows, const std::vector<RowCase>& cases,
                   double temperature, ErrorsByScale errors, const Scores& got,
                   const std::string& where) {
  const LogitTransform transform{1.0, 0.0, temperature};
  include_errors(type, cases, temperature, &errors);
  std::vector<Truth> truths;
  for (const RowCase& row : cases) {
    truths.emplace_back(row.x, static_cast<size_t>(row.scored ? row.label : 0), transform);
  }
  for (size_t i = 0; i < cases.size(); ++i) {
    const RowCase& row = cases[i];
    const std::string what = where + ", " + row.name + ": ";
    const double* stats = &got.stats[3 * i];
    if (row.label == kIgnore) {
      for (const double value :
           {got.logps[i], got.entropy[i], got.log_sum_sq_probs[i], got.mean_logits[i]}) {
        EXPECT_EQ(value, 0.0) << what;
      }
      EXPECT_EQ(got.is_top1[i], 0) << what;
      for (int k = 0; k < 3; ++k) EXPECT_EQ(stats[k], 0.0) << what;
      continue;
    }
    if (!row.scored) {
      for (const double value : {got.logps[i], got.entropy[i], got.log_sum_sq_probs[i],
                                 got.mean_logits[i], stats[0], stats[1], stats[2]}) {
        EXPECT_TRUE(std::isnan(value)) << what;
      }
      EXPECT_EQ(got.is_top1[i], 0) << what;
      continue;
    }
    const RowResult cpu = cpu_score(type, rows.row(i), row.x.size(), row.label, transform);
    EXPECT_EQ(got.is_top1[i] != 0, cpu.is_top1) << what << "is_top1";
    EXPECT_LE(got.is_top1[i], 1) << what;
    if (!row.number) {
      EXPECT_TRUE(std::isnan(got.logps[i]) && std::isnan(cpu.logp)) << what << got.logps[i];
      EXPECT_EQ(std::isnan(got.entropy[i]), std::isnan(cpu.entropy)) << what;
      EXPECT_EQ(std::isnan(got.log_sum_sq_probs[i]), std::isnan(cpu.log_sum_sq_probs)) << what;
      EXPECT_EQ(distance(got.mean_logits[i], cpu.mean_logits) < 1e-5, true)
          << what << got.mean_logits[i] << " " << cpu.mean_logits;
      EXPECT_TRUE(std::isnan(stats[2])) << what << "its gradient must be NaN, too";
      continue;
    }
    const Truth& truth = truths[i];
    const PlainErrors& e = errors[row.large];
    const auto near = [&](double value, long double want, double error, double of_cpu,
                          const char* name) {
      expect_near(type, value, want, allowed(type, error, static_cast<double>(want)), of_cpu, truth,
                  what + name);
    };
    EXPECT_EQ(got.is_top1[i] != 0, truth.is_top1) << what << "is_top1";
    near(got.logps[i], truth.logp, e.logp, cpu.logp, "logp");
    const double slack = of_dominating(type, truth, static_cast<size_t>(row.label));
    expect_near(type, got.entropy[i], truth.entropy,
                allowed(type, e.entropy, static_cast<double>(truth.entropy)) + slack, cpu.entropy,
                truth, what + "entropy");
    expect_near(
        type, got.log_sum_sq_probs[i], truth.log_sum_sq_probs,
        allowed(type, e.log_sum_sq_probs, static_cast<double>(truth.log_sum_sq_probs)) + 2 * slack,
        cpu.log_sum_sq_probs, truth, what + "log_sum_sq_probs");
    near(got.mean_logits[i], truth.mean, e.mean, cpu.mean_logits, "mean_logits");
    near(stats[0], truth.max, 0.0, cpu.max, "max");
    const double share = share_error(type, truth, static_cast<size_t>(row.label));
    if (!row.large) {
      EXPECT_LE(distance(stats[1], truth.log_sum),
                share + 4 * ulp(result_of(type), static_cast<double>(truth.log_sum)))
          << what << "log_sum";
      EXPECT_LE(distance(stats[2], truth.rest_share), share * static_cast<double>(truth.rest_share))
          << what << "1 - p_label";
    }
  }
}

TEST_P(TokenLogps, ScoresMatchTheDefinitionsInEveryLayout) {
  unsigned seed = 0;
  for (const size_t vocab : kVocabs) {
    const double temperature = seed % 3 == 0 ? 1.0 : seed % 3 == 1 ? 0.7 : 1.9;
    ErrorsByScale errors(2);
    for (unsigned sample = 0; sample < kSamples; ++sample) {
      include_errors(type, row_cases(type, vocab, 1000 + sample), temperature, &errors);
    }
    for (const Lie lie : kLies) {
      const auto cases = row_cases(type, vocab, ++seed);
      TypedRows rows(type, cases.size(), vocab, lie);
      rows.set(values_of(cases));
      const Scores got = score(rows, labels_of(cases), temperature, kAllMetrics, seed);
      expect_scores(type, rows, cases, temperature, errors, got,
                    std::string(name_of(type)) + ", vocab " + std::to_string(vocab) + ", layout " +
                        std::to_string(static_cast<int>(lie)));
    }
  }
}

TEST_P(TokenLogps, NoOrderOfThreadsAndBlocksChangesABit) {
  for (const size_t vocab : {size_t{9}, size_t{1001}}) {
    const auto cases = row_cases(type, vocab, 77);
    TypedRows rows(type, cases.size(), vocab, Lie::kPadded);
    rows.set(values_of(cases));
    const Scores want = score(rows, labels_of(cases), 1.0, kAllMetrics, 0);
    for (const uint64_t seed : {1, 2, 3}) {
      const Scores got = score(rows, labels_of(cases), 1.0, kAllMetrics, seed);
      EXPECT_EQ(got.bytes, want.bytes) << vocab;
      EXPECT_EQ(got.is_top1, want.is_top1) << vocab;
    }
  }
}

TEST_P(TokenLogps, NoMetricChangesABitOfTheOthers) {
  for (const size_t vocab : {size_t{7}, size_t{130}}) {
    const auto cases = row_cases(type, vocab, 5);
    TypedRows rows(type, cases.size(), vocab, Lie::kMisaligned);
    rows.set(values_of(cases));
    const Scores all = score(rows, labels_of(cases), 1.3, kAllMetrics, 1);
    for (unsigned metrics = 0; metrics < kAllMetrics; ++metrics) {
      const Scores got = score(rows, labels_of(cases), 1.3, metrics, 2);
      EXPECT_EQ(got.bytes[0], all.bytes[0]) << metrics;
      if (metrics & kEntropy) {
        EXPECT_EQ(got.bytes[1], all.bytes[1]) << metrics;
      }
      if (metrics & kLogSumSqProbs) {
        EXPECT_EQ(got.bytes[2], all.bytes[2]) << metrics;
      }
      if (metrics & kMeanLogits) {
        EXPECT_EQ(got.bytes[3], all.bytes[3]) << metrics;
      }
      EXPECT_EQ(got.bytes[4], all.bytes[4]) << metrics;
      if (metrics & kIsTop1) {
        EXPECT_EQ(got.is_top1, all.is_top1) << metrics;
      }
    }
  }
}

// The same row at another address, in another place of the batch.
TEST_P(TokenLogps, TheOrderOfRowsOnlyPermutesTheResults) {
  const auto cases = row_cases(type, 131, 11);
  const size_t n = cases.size();
  std::vector<RowCase> turned;
  for (size_t i = 0; i < n; ++i) turned.push_back(cases[(i + 3) % n]);
  TypedRows rows(type, n, 131, Lie::kDense), turned_rows(type, n, 131, Lie::kDense);
  rows.set(values_of(cases));
  turned_rows.set(values_of(turned));
  const Scores want = score(rows, labels_of(cases), 1.0, kAllMetrics, 1);
  const Scores got = score(turned_rows, labels_of(turned), 1.0, kAllMetrics, 1);
  for (size_t i = 0; i < n; ++i) {
    const size_t j = (i + 3) % n;
    EXPECT_EQ(distance(got.logps[i], want.logps[j]), 0.0) << turned[i].name;
    EXPECT_EQ(distance(got.entropy[i], want.entropy[j]), 0.0) << turned[i].name;
    EXPECT_EQ(distance(got.log_sum_sq_probs[i], want.log_sum_sq_probs[j]), 0.0) << turned[i].name;
    EXPECT_EQ(distance(got.mean_logits[i], want.mean_logits[j]), 0.0) << turned[i].name;
    EXPECT_EQ(distance(got.stats[3 * i + 2], want.stats[3 * j + 2]), 0.0) << turned[i].name;
  }
}

// Where a label, its ties and the maximum stand must not matter: every position of a short row, in
// every place of a vector.
TEST_P(TokenLogps, TheFirstMaximumIsFoundWhereverItStands) {
  constexpr size_t kVocab = 21;
  for (const Lie lie : {Lie::kDense, Lie::kMisaligned}) {
    TypedRows rows(type, kVocab + 3, kVocab, lie);
    for (const size_t tie : {size_t{0}, size_t{4}, size_t{11}, size_t{20}}) {
      std::vector<std::vector<double>> values(kVocab + 3, random_values(type, kVocab, 1.0, 3));
      std::vector<int64_t> labels(kVocab + 3, kIgnore);
      for (size_t y = 0; y < kVocab; ++y) {
        values[y][y] = values[y][tie] = 8.0;
        labels[y] = static_cast<int64_t>(y);
      }
      rows.set(values);
      const Scores got = score(rows, labels, 1.0, kIsTop1, 4);
      for (size_t y = 0; y < kVocab; ++y)
        EXPECT_EQ(got.is_top1[y] != 0, y <= tie) << y << " " << tie;
    }
  }
}

// Where one logit that is not the label's has nearly all the mass, the plain expression has its
// exponential as exactly 1: the entropy is not below 0, nor the sum of squares above 1.
TEST_P(TokenLogps, ADominatingLogitHasAProbabilityOfOne) {
  for (const size_t vocab : {size_t{2}, size_t{9}, size_t{300}}) {
    std::vector<std::vector<double>> values;
    std::vector<int64_t> labels;
    for (size_t i = 0; i < 16; ++i) {
      values.push_back(random_values(type, vocab, 2.0, static_cast<unsigned>(i)));
      labels.push_back(static_cast<int64_t>(i % vocab));
      values[i][(i + 1) % vocab] = rounded(type, 60.0 + 7.3 * static_cast<double>(i));
    }
    TypedRows rows(type, 16, vocab, Lie::kDense);
    rows.set(values);
    const Scores got = score(rows, labels, 0.9, kAllMetrics, 5);
    for (size_t i = 0; i < 16; ++i) {
      const Truth want(values[i], static_cast<size_t>(labels[i]), {1.0, 0.0, 0.9});
      const double unit = ulp(result_of(type), 1.0) * 0x1p-10;
      EXPECT_GE(got.entropy[i], 0.0) << vocab << " " << i;
      EXPECT_LE(distance(got.entropy[i], want.entropy), unit) << vocab << " " << i;
      EXPECT_LE(got.log_sum_sq_probs[i], 0.0) << vocab << " " << i;
      EXPECT_LE(distance(got.log_sum_sq_probs[i], want.log_sum_sq_probs), unit)
          << vocab << " " << i;
    }
  }
}

// The ignored label may be one of the vocabulary's, as for a padding token.
TEST_P(TokenLogps, AnIgnoredLabelWithinTheVocabularyIsIgnored) {
  const auto x = random_values(type, 37, 3.0, 9);
  TypedRows rows(type, 3, 37, Lie::kDense);
  rows.set({x, x, x});
  const Scores kept = score(rows, {3, 5, 36}, 1.0, kAllMetrics, 1);
  const Scores got = score(rows, {3, 5, 36}, 1.0, kAllMetrics, 1, 5);
  for (const auto& [values, all] :
       {std::pair{&got.logps, &kept.logps}, std::pair{&got.entropy, &kept.entropy},
        std::pair{&got.mean_logits, &kept.mean_logits}}) {
    EXPECT_EQ((*values)[0], (*all)[0]);
    EXPECT_EQ((*values)[1], 0.0);
    EXPECT_EQ((*values)[2], (*all)[2]);
  }
  EXPECT_NE(kept.logps[1], 0.0);
}

// Rows that are all one row: a leading stride of 0.
TEST_P(TokenLogps, ExpandedRowsAreReadWhereTheyLie) {
  const auto x = random_values(type, 37, 3.0, 9);
  TypedRows one(type, 4, 37, Lie::kDense);
  one.set({x, x, x, x});
  TypedRows expanded(type, 4, 37, Lie::kDense);
  expanded.set({x, x, x, x});
  expanded.view.layout.stride[0] = 0;
  const std::vector<int64_t> labels = {3, 36, 0, 3};
  EXPECT_EQ(score(expanded, labels, 1.0, kAllMetrics, 3).bytes,
            score(one, labels, 1.0, kAllMetrics, 2).bytes);
}

TEST_P(TokenLogps, NoRowsAreNoLaunch) {
  TypedRows rows(type, 0, 9, Lie::kDense);
  score(rows, {}, 1.0, kAllMetrics, 1);
}

// Two rows whose distance in elements is beyond 32 bits.
TEST(TokenLogpsFar, OffsetsHave64Bits) {
  const auto x = random_values(DType::bf16, 50, 3.0, 9);
  const int64_t far = (int64_t{1} << 32) + 128;  // as far from a multiple of 256 bytes as row 0
  const cuda_host::ReservedMemory memory(static_cast<size_t>(far + 50) * 2);
  for (size_t v = 0; v < 50; ++v) {
    store(DType::bf16, memory.data(), v, 1.0);
    store(DType::bf16, memory.data(), static_cast<size_t>(far) + v, x[v]);
  }
  TypedRows near(DType::bf16, 4, 50, Lie::kDense), rows(DType::bf16, 4, 50, Lie::kDense);
  near.set({x, x, x, x});
  near.view.layout.stride[0] = 0;
  rows.view.data = memory.data();
  rows.view.layout.dims = 2;
  const int64_t size[] = {2, 2}, stride[] = {far, 0};
  std::copy(size, size + 2, rows.view.layout.size);
  std::copy(stride, stride + 2, rows.view.layout.stride);
  const std::vector<int64_t> labels = {kIgnore, kIgnore, 3, 3};
  const Scores want = score(near, labels, 1.0, kAllMetrics, 2),
               got = score(rows, labels, 1.0, kAllMetrics, 3);
  EXPECT_EQ(got.bytes, want.bytes);
}

INSTANTIATE_TEST_SUITE_P(Type, TokenLogps, testing::ValuesIn(kTypes),
                         [](const auto& param) { return std::string(name_of(param.param)); });

}  // namespace
}  // namespace fusedpo
