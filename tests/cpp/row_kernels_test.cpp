// The row kernels against plain double-precision loops over the definitions, for every instruction
// set this machine can run.
#include "cpu/row_kernels.h"
#include "core/finish_row.h"
#include "cpu/row_stats.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace fusedpo {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr unsigned kAllMetrics = kEntropy | kLogSumSqProbs | kMeanLogits | kIsTop1;

std::vector<const RowKernels*> available() {
  std::vector<const RowKernels*> all;
  for (const char* name : {"generic", "avx2", "avx512"}) {
    if (const RowKernels* kernels = row_kernels(name)) all.push_back(kernels);
  }
  return all;
}

class RowKernelsTest : public testing::TestWithParam<const RowKernels*> {
 protected:
  const RowKernels& kernels() const { return *GetParam(); }

  // Scores a row of floats (or doubles) cut into segments of `width`; `e`, when given, receives
  // exp(z - max) over all columns.
  template <typename C>
  RowResult score(const std::vector<C>& x, int64_t label, int64_t width,
                  const LogitTransform& transform = {}, const std::vector<C>* bias = nullptr,
                  std::vector<double>* e = nullptr) const {
    const DType type = sizeof(C) == 8 ? DType::f64 : DType::f32;
    const int64_t vocab = static_cast<int64_t>(x.size());
    RowStats stats;
    if (e != nullptr) e->assign(x.size(), 0.0);
    for (int64_t v = 0; v < vocab; v += width) {
      const int64_t n = std::min(width, vocab - v);
      std::vector<C> part(static_cast<size_t>(n));
      const Segment segment{x.data() + v, type, bias ? bias->data() + v : nullptr, n, label - v};
      const double factor =
          kernels().accumulate(type, segment, transform, kAllMetrics, nullptr, &stats, part.data());
      if (e == nullptr) continue;
      for (int64_t i = 0; i < v; ++i) (*e)[static_cast<size_t>(i)] *= factor;
      for (int64_t i = 0; i < n; ++i) {
        (*e)[static_cast<size_t>(v + i)] = static_cast<double>(part[static_cast<size_t>(i)]);
      }
    }
    const double anchor = stats.max;
    settle(&stats);
    if (e != nullptr) {
      for (double& value : *e) value *= std::exp(anchor - stats.max);
    }
    return finish_row(stats, vocab);
  }
};

// The definitions, in double.
struct Plain {
  std::vector<double> z, p, slope;
  double logp, entropy = 0.0, log_sum_sq_probs, mean = 0.0;
  bool is_top1 = true;

  template <typename C>
  Plain(const std::vector<C>& x, int64_t label, const LogitTransform& t = {},
        const std::vector<C>* bias = nullptr) {
    double max = -kInf, sum = 0.0, sum_sq = 0.0;
    const size_t y = static_cast<size_t>(label);
    for (size_t i = 0; i < x.size(); ++i) {
      const double a =
          t.scale * (static_cast<double>(x[i]) + (bias ? static_cast<double>((*bias)[i]) : 0.0));
      const double capped = t.softcap > 0 ? t.softcap * std::tanh(a / t.softcap) : a;
      const double tanh_a = t.softcap > 0 ? std::tanh(a / t.softcap) : 0.0;
      z.push_back(capped / t.temperature);
      slope.push_back(t.scale / t.temperature * (1.0 - tanh_a * tanh_a));
      max = std::max(max, z.back());
    }
    for (double v : z) sum += std::exp(v - max);
    const double lse = max + std::log(sum);
    for (size_t i = 0; i < z.size(); ++i) {
      p.push_back(std::exp(z[i] - lse));
      if (p[i] > 0) entropy -= p[i] * (z[i] - lse);
      sum_sq += p[i] * p[i];
      mean += z[i] / static_cast<double>(z.size());
      if (i < y ? z[i] >= z[y] : z[i] > z[y]) is_top1 = false;
    }
    logp = z[y] - lse;
    log_sum_sq_probs = std::log(sum_sq);
  }
};

template <typename C>
std::vector<C> random_row(size_t n, double spread, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal(0.0, spread);
  std::vector<C> row(n);
  for (C& v : row) v = static_cast<C>(normal(engine));
  return row;
}

// Widths below, at and beyond one vector, one block of a sum (256) and one segment (4096).
const int64_t kVocabs[] = {2, 3, 7, 16, 127, 257, 1000, 5000};

TEST_P(RowKernelsTest, ScoresMatchTheDefinitionHoweverTheRowIsCut) {
  for (int64_t vocab : kVocabs) {
    const auto x = random_row<float>(static_cast<size_t>(vocab), 4.0, 1);
    for (int64_t label : {int64_t{0}, vocab / 2, vocab - 1}) {
      const Plain want(x, label);
      for (int64_t width : {int64_t{1}, int64_t{5}, int64_t{512}, kMaxSegment}) {
        const RowResult got = score(x, label, width);
        EXPECT_NEAR(got.logp, want.logp, 1e-6) << vocab;
        EXPECT_NEAR(got.entropy, want.entropy, 1e-6 * (1 + want.entropy));
        EXPECT_NEAR(got.log_sum_sq_probs, want.log_sum_sq_probs, 2e-6);
        EXPECT_NEAR(got.mean_logits, want.mean, 2e-6);
        EXPECT_EQ(got.is_top1, want.is_top1);
        EXPECT_NEAR(got.rest_share, 1.0 - want.p[static_cast<size_t>(label)], 5e-7);
      }
    }
  }
}

TEST_P(RowKernelsTest, DoubleRowsAreScoredInDouble) {
  const auto x = random_row<double>(1000, 4.0, 2);
  const Plain want(x, 17);
  const RowResult got = score(x, 17, 300);
  EXPECT_NEAR(got.logp, want.logp, 1e-14 * std::fabs(want.logp));
  EXPECT_NEAR(got.entropy, want.entropy, 1e-13);
  EXPECT_NEAR(got.log_sum_sq_probs, want.log_sum_sq_probs, 1e-13);
}

TEST_P(RowKernelsTest, TheTransformAppliesBiasScaleCapAndTemperatureInThisOrder) {
  const auto x = random_row<float>(700, 6.0, 3), bias = random_row<float>(700, 1.0, 4);
  for (double softcap : {0.0, 5.0, 30.0}) {
    const LogitTransform t{0.7, softcap, 1.6};
    const Plain want(x, 123, t, &bias);
    const RowResult got = score(x, 123, 256, t, &bias);
    EXPECT_NEAR(got.logp, want.logp, 2e-6) << softcap;
    EXPECT_NEAR(got.mean_logits, want.mean, 1e-6) << softcap;
    EXPECT_NEAR(got.entropy, want.entropy, 3e-6) << softcap;
  }
}

TEST_P(RowKernelsTest, ExponentialsAreZeroAtTheLabelAndRescaleToTheMaximum) {
  const auto x = random_row<float>(900, 4.0, 5);
  for (double softcap : {0.0, 6.0}) {
    const LogitTransform t{1.0, softcap, 1.0};
    std::vector<double> e;
    const RowResult row = score(x, 450, 128, t, static_cast<std::vector<float>*>(nullptr), &e);
    const Plain want(x, 450, t);
    for (size_t i = 0; i < x.size(); ++i) {
      const double p = e[i] * std::exp(-row.log_sum);
      EXPECT_NEAR(p, i == 450 ? 0.0 : want.p[i] * want.slope[i], 5e-7);
    }
  }
}

TEST_P(RowKernelsTest, ConfidentTokensKeepTheirRelativePrecision) {
  std::vector<float> x(1000, -30.0f);  // p_y = 1 - 1e-13
  x[3] = 6.9f;
  const Plain want(x, 3);
  const RowResult got = score(x, 3, 256);
  const double rest = 999 * std::exp(-36.9);
  EXPECT_NEAR(got.logp / -std::log1p(rest), 1.0, 1e-5);
  EXPECT_NEAR(got.rest_share / (rest / (1 + rest)), 1.0, 1e-5);
  EXPECT_GT(got.entropy, 0.0);
}

TEST_P(RowKernelsTest, ATargetFarBelowTheMaximumKeepsItsPrecision) {
  auto x = random_row<float>(1000, 2.0, 6);
  x[9] = -50.0f;
  const Plain want(x, 9);
  const RowResult got = score(x, 9, 256);
  EXPECT_NEAR(got.logp, want.logp, 1e-5);
  EXPECT_NEAR(got.entropy, want.entropy, 2e-6);
}

TEST_P(RowKernelsTest, AnAnchorFarAwayCostsNoPrecision) {
  // A guess below the maximum by less and by more than the anchor waits for, and one above.
  for (double below : {1.5, 2.5, 30.0, 90.0, 500.0, -5.0}) {
    auto x = random_row<float>(3000, 2.0, 13);
    x[1700] = 15.0f;
    const Plain want(x, 40);
    RowStats stats;
    stats.max = 15.0 - below;
    for (int64_t v = 0; v < 3000; v += 1000) {
      const Segment segment{x.data() + v, DType::f32, nullptr, 1000, 40 - v};
      kernels().accumulate(DType::f32, segment, {}, kAllMetrics, nullptr, &stats, nullptr);
    }
    settle(&stats);
    const RowResult got = finish_row(stats, 3000);
    EXPECT_EQ(got.max, 15.0);
    EXPECT_NEAR(got.logp, want.logp, 1e-6) << below;
    EXPECT_NEAR(got.entropy, want.entropy, 1e-6) << below;
    EXPECT_NEAR(got.log_sum_sq_probs, want.log_sum_sq_probs, 1e-6) << below;
    EXPECT_NEAR(got.log_sum,
                std::log1p(std::expm1(want.z[1700] - 15.0) + (1.0 - want.p[1700]) / want.p[1700]),
                1e-6)
        << below;
  }
}

TEST_P(RowKernelsTest, StretchesOfARowJoinToTheWhole) {
  auto x = random_row<float>(1200, 3.0, 14);
  x[100] = x[700] = 14.0f;  // a tie for the maximum, in different stretches
  const float masked = -std::numeric_limits<float>::infinity();
  std::fill(x.begin() + 800, x.begin() + 1000, masked);
  for (int64_t label : {0, 100, 399, 400, 700, 850, 1199}) {
    const RowResult want = score(x, label, 400);
    RowStats row;
    for (int64_t v = 0; v < 1200; v += 200) {
      RowStats part;
      const Segment segment{x.data() + v, DType::f32, nullptr, 200, label - v};
      kernels().accumulate(DType::f32, segment, {}, kAllMetrics, nullptr, &part, nullptr);
      append(part, &row);
    }
    settle(&row);
    const RowResult got = finish_row(row, 1200);
    EXPECT_EQ(got.is_top1, label == 100) << label;
    EXPECT_EQ(got.is_top1, want.is_top1) << label;
    EXPECT_EQ(got.max, want.max) << label;
    if (label == 850) {
      EXPECT_EQ(got.logp, -kInf);
    } else {
      EXPECT_NEAR(got.logp, want.logp, 1e-6) << label;
    }
    EXPECT_NEAR(got.entropy, want.entropy, 1e-6) << label;
    EXPECT_NEAR(got.log_sum_sq_probs, want.log_sum_sq_probs, 1e-6) << label;
    EXPECT_EQ(row.count, 1200);
  }
}

TEST_P(RowKernelsTest, TheFirstMaximumWinsATie) {
  std::vector<float> x(600, 0.0f);
  x[100] = x[500] = 3.0f;
  for (int64_t width : {64, 600}) {
    EXPECT_TRUE(score(x, 100, width).is_top1);
    EXPECT_FALSE(score(x, 500, width).is_top1);
    EXPECT_FALSE(score(x, 0, width).is_top1);
  }
}

TEST_P(RowKernelsTest, MaskedLogitsCountForNothingWhereverTheyStand) {
  const float masked = -std::numeric_limits<float>::infinity();
  std::vector<float> x(300, masked);
  x[200] = 1.0f;
  x[250] = 2.0f;
  for (int64_t width : {50, 300}) {
    const RowResult r = score(x, 250, width);
    EXPECT_NEAR(r.logp, -std::log1p(std::exp(-1.0)), 1e-7);
    EXPECT_GT(r.entropy, 0.0);
    EXPECT_EQ(score(x, 0, width).logp, -kInf);
  }
}

TEST_P(RowKernelsTest, NanAndInfinityReachTheResult) {
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    auto x = random_row<float>(300, 1.0, 7);
    x[200] = bad;
    for (int64_t width : {64, 300}) {  // narrower and wider than what is summed in one go
      for (int64_t label : {5, 200}) {
        const RowResult row = score(x, label, width);
        EXPECT_TRUE(std::isnan(row.logp)) << width;
        EXPECT_TRUE(std::isnan(row.entropy)) << width;
      }
    }
  }
}

TEST_P(RowKernelsTest, GradientsMatchTheDefinition) {
  const auto x = random_row<float>(1300, 3.0, 8), bias = random_row<float>(1300, 1.0, 9);
  for (double softcap : {0.0, 8.0}) {
    const LogitTransform t{0.9, softcap, 1.3};
    const int64_t label = 77;
    const Plain plain(x, label, t, &bias);
    const RowResult r = score(x, label, 512, t, &bias);
    for (double c_entropy : {0.0, -0.8}) {
      const RowGradient row{r.max, r.log_sum, r.rest_share, 1.7, c_entropy, r.entropy};
      std::vector<float> grad(x.size());
      for (int64_t v = 0; v < 1300; v += 512) {
        const int64_t n = std::min<int64_t>(512, 1300 - v);
        const Segment segment{x.data() + v, DType::f32, bias.data() + v, n, label - v};
        kernels().gradient(DType::f32, segment, t, row, grad.data() + v, DType::f32);
      }
      for (size_t i = 0; i < x.size(); ++i) {
        const double onehot = i == static_cast<size_t>(label) ? 1.0 : 0.0;
        const double want =
            plain.slope[i] * (1.7 * (onehot - plain.p[i]) -
                              c_entropy * plain.p[i] * (std::log(plain.p[i]) + plain.entropy));
        EXPECT_NEAR(static_cast<double>(grad[i]), want, 1e-6) << i << " " << softcap;
      }
    }
  }
}

// exp(x[i]) as the kernels store it, for x[1...]; at x[0] stands the label.
std::vector<float> exponentials(const RowKernels& kernels, const std::vector<float>& x) {
  std::vector<float> e(x.size());
  RowStats stats;
  stats.max = 0.0;  // the anchor
  const Segment segment{x.data(), DType::f32, nullptr, static_cast<int64_t>(x.size()), 0};
  kernels.accumulate(DType::f32, segment, {}, 0, nullptr, &stats, e.data());
  return e;
}

TEST_P(RowKernelsTest, ExponentialIsWithinTwoUlpAndWhatLn2IsRoundedBy) {
  double worst = 0.0;
  std::vector<float> x(4096);
  for (int step = 0; step < 64; ++step) {
    for (size_t i = 1; i < x.size(); ++i) {
      x[i] = -87.3f * (static_cast<float>(step) + static_cast<float>(i) / 4096.0f) / 64.0f;
    }
    const std::vector<float> e = exponentials(kernels(), x);
    for (size_t i = 1; i < x.size(); ++i) {
      const double at = static_cast<double>(x[i]), want = std::exp(at);
      const double allowed = 2 * 1.2e-7 + 3e-9 * std::fabs(at);
      worst = std::max(worst, std::fabs(static_cast<double>(e[i]) - want) / want / allowed);
    }
  }
  EXPECT_LT(worst, 1.0);
  EXPECT_GT(worst, 0.1);  // it was looked at
}

TEST_P(RowKernelsTest, ExponentialFadesToZeroAndKeepsEveryNan) {
  std::vector<float> x(4096);
  for (size_t i = 1; i < x.size(); ++i) x[i] = -87.3f - 1e-3f * static_cast<float>(i);
  std::vector<float> e = exponentials(kernels(), x);
  for (size_t i = 1; i < x.size(); ++i) {
    EXPECT_GE(e[i], 0.0f) << x[i];
    EXPECT_LE(e[i], x[i] > -88.03f ? 1.3e-38f : 0.0f) << x[i];
  }
  for (const uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7f8abcdfu, 0xffffffffu}) {
    std::fill(x.begin(), x.end(), -std::numeric_limits<float>::infinity());
    std::memcpy(&x[100], &bits, sizeof bits);
    std::memcpy(&x[4095], &bits, sizeof bits);
    e = exponentials(kernels(), x);
    for (size_t i = 1; i < x.size(); ++i) {
      EXPECT_EQ(std::isnan(e[i]), i == 100 || i == 4095) << i;
      if (!std::isnan(e[i])) {
        EXPECT_EQ(e[i], 0.0f) << i;
      }
    }
  }
}

TEST_P(RowKernelsTest, EveryHalfPrecisionValueSurvivesTheRoundTrip) {
  std::vector<uint16_t> bits(65536), back(65536);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  for (DType type : {DType::bf16, DType::f16}) {
    std::vector<float> wide(65536);
    kernels().convert(type, bits.data(), type, DType::f32, wide.data(), 65536);
    kernels().convert(DType::f32, wide.data(), type, type, back.data(), 65536);
    for (size_t i = 0; i < bits.size(); ++i) {
      if (std::isnan(wide[i])) {
        const uint16_t exponent = type == DType::f16 ? 0x7c00 : 0x7f80;
        EXPECT_EQ(back[i] & exponent, exponent);
      } else {
        EXPECT_EQ(back[i], bits[i]);
      }
    }
  }
}

TEST_P(RowKernelsTest, NarrowingRoundsToNearestEven) {
  struct Case {
    float value;
    uint16_t bf16_bits, f16_bits;
  };
  // Ties, the largest finite half and what lies beyond, subnormals of both kinds, zero's sign.
  const Case cases[] = {
      {1.0f, 0x3f80, 0x3c00},           {-0.0f, 0x8000, 0x8000},
      {1.00390625f, 0x3f80, 0x3c04},     // 1 + 2^-8: a tie for bf16, to even
      {1.01171875f, 0x3f82, 0x3c0c},     // 1 + 3 * 2^-8: a tie, to even
      {1.00048828125f, 0x3f80, 0x3c00},  // 1 + 2^-11: a tie for f16, to even
      {65504.0f, 0x4780, 0x7bff},       {65519.0f, 0x4780, 0x7bff},
      {65520.0f, 0x4780, 0x7c00},       {0x1p-24f, 0x3380, 0x0001},
      {0x1p-25f, 0x3300, 0x0000},       {0x1.8p-24f, 0x33c0, 0x0002},
      {-0x1p-14f, 0xb880, 0x8400},      {std::numeric_limits<float>::infinity(), 0x7f80, 0x7c00}};
  for (const Case& c : cases) {
    uint16_t got = 0;
    kernels().convert(DType::f32, &c.value, DType::bf16, DType::bf16, &got, 1);
    EXPECT_EQ(got, c.bf16_bits) << c.value;
    kernels().convert(DType::f32, &c.value, DType::f16, DType::f16, &got, 1);
    EXPECT_EQ(got, c.f16_bits) << c.value;
  }
}

TEST_P(RowKernelsTest, RoundingThroughANarrowerTypeIsThatTypesRounding) {
  const auto x = random_row<float>(2500, 3.0, 10);
  std::vector<float> through(x.size());
  std::vector<bf16> narrow(x.size());
  kernels().convert(DType::f32, x.data(), DType::bf16, DType::f32, through.data(), 2500);
  kernels().convert(DType::f32, x.data(), DType::bf16, DType::bf16, narrow.data(), 2500);
  for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(through[i], to_float(narrow[i]));
}

TEST_P(RowKernelsTest, ScaleScaleAddAndDotDoWhatTheySay) {
  const auto a = random_row<float>(2100, 1.0, 11), b = random_row<float>(2100, 1.0, 12);
  double dot = 0.0;
  for (size_t i = 0; i < a.size(); ++i) dot += static_cast<double>(a[i]) * b[i];
  EXPECT_NEAR(kernels().dot(DType::f32, a.data(), DType::f32, b.data(), DType::f32, 2100), dot,
              1e-4);
  std::vector<float> y = a, out(a.size());
  kernels().scale_add(DType::f32, 2.0, y.data(), -3.0, b.data(), DType::f32, 2100);
  kernels().scale(DType::f32, 0.5, a.data(), out.data(), DType::f32, 2100);
  std::vector<float> fresh(a.size(), std::numeric_limits<float>::quiet_NaN());
  kernels().scale_add(DType::f32, 0.0, fresh.data(), 4.0, b.data(), DType::f32, 2100);
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_NEAR(y[i], 2.0f * a[i] - 3.0f * b[i], 1e-5);
    EXPECT_EQ(out[i], 0.5f * a[i]);
    EXPECT_EQ(fresh[i], 4.0f * b[i]);
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, RowKernelsTest, testing::ValuesIn(available()),
                         [](const auto& param) { return std::string(param.param->name); });

TEST(RowKernelsChoice, UnknownNamesAreNotFound) { EXPECT_EQ(row_kernels("sse9"), nullptr); }

}  // namespace
}  // namespace fusedpo
