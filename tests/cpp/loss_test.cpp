// The loss family: hand values, derivatives against finite differences, finite results at the ends
// of the range, and the batch loop with sorting, weights and scaling.
#include "core/loss.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cpu/loss_cpu.h"

namespace fusedpo {
namespace {

constexpr double kLog2 = 0.693147180559945309417;
constexpr int kLosses = static_cast<int>(PairLoss::kCount);

PairOptions options(double label_smoothing = 0.0) {
  return {0.1, label_smoothing, FDivergence::kReverseKl, 0.5, 0.05, 0.5, 0.0};
}

double value_of(PairLoss loss, double chosen, double rejected, const PairOptions& o) {
  return pair_loss(loss, {chosen, rejected, 1.0, 1.0}, o).value;
}

TEST(LossTest, HandValuesAtRatiosOneAndMinusOne) {
  EXPECT_NEAR(value_of(PairLoss::kSigmoid, 1, -1, options()), 0.598138869, 1e-9);
  EXPECT_NEAR(value_of(PairLoss::kCdpo, 1, -1, options(0.1)), 0.618138869, 1e-9);
  EXPECT_NEAR(value_of(PairLoss::kHinge, 1, -1, options()), 0.8, 1e-15);
  EXPECT_NEAR(value_of(PairLoss::kIpoSum, 1, -1, options()), 9.0, 1e-14);
  EXPECT_NEAR(value_of(PairLoss::kRobust, 1, -1, options(0.1)), 0.573138869, 1e-9);
}

TEST(LossTest, HandValuesAtEqualRatios) {
  for (const double r : {0.0, 3.0}) {
    EXPECT_NEAR(value_of(PairLoss::kSigmoid, r, r, options()), kLog2, 1e-15);
    EXPECT_EQ(value_of(PairLoss::kHinge, r, r, options()), 1.0);
    EXPECT_NEAR(value_of(PairLoss::kApoZero, r, r, options()), 1.0, 1e-15);
    EXPECT_NEAR(value_of(PairLoss::kExoPair, r, r, options(1e-3)), 2.761230709, 1e-9);
  }
  EXPECT_NEAR(value_of(PairLoss::kNcaPair, 0, 0, options()), 2 * kLog2, 1e-15);
}

TEST(LossTest, AlphaZeroOfAlphapoIsSimpo) {
  const PairInput in{-12.0, -30.0, 7.0, 11.0};
  const PairTerm simpo = pair_loss(PairLoss::kSimpo, in, options());
  const PairTerm alphapo = pair_loss(PairLoss::kAlphapo, in, options());
  EXPECT_EQ(simpo.value, alphapo.value);
  EXPECT_EQ(simpo.slope_chosen, alphapo.slope_chosen);
}

// The derivative of every loss is that of its value: central differences, away from the kinks.
TEST(LossTest, SlopesAreDerivativesOfTheValues) {
  for (int code = 0; code < kLosses; ++code) {
    const PairLoss loss = static_cast<PairLoss>(code);
    if (sorts_batch(loss)) continue;
    for (int f = 0; f < 4; ++f) {
      PairOptions o = options(0.2);
      o.f_divergence = static_cast<FDivergence>(f);
      o.alpha = 0.3;
      const PairInput in{-2.3, -1.1, 3.0, 4.0};
      const PairTerm term = pair_loss(loss, in, o);
      const double h = 1e-5;
      PairInput up = in, down = in;
      up.chosen += h;
      down.chosen -= h;
      const double chosen =
          (pair_loss(loss, up, o).value - pair_loss(loss, down, o).value) / (2 * h);
      up = down = in;
      up.rejected += h;
      down.rejected -= h;
      const double rejected =
          (pair_loss(loss, up, o).value - pair_loss(loss, down, o).value) / (2 * h);
      EXPECT_NEAR(term.slope_chosen, chosen, 1e-8 * (1 + std::fabs(chosen))) << code << " " << f;
      EXPECT_NEAR(term.slope_rejected, rejected, 1e-8 * (1 + std::fabs(rejected)))
          << code << " " << f;
    }
  }
}

TEST(LossTest, EverythingIsFiniteInFp32UpToMarginsOfTenThousand) {
  const double ends[] = {-1e5, -1e3, -1e-7, 0.0, 1e-7, 1e3, 1e5};
  for (int code = 0; code < kLosses; ++code) {
    const PairLoss loss = static_cast<PairLoss>(code);
    if (sorts_batch(loss)) continue;
    for (int f = 0; f < 4; ++f) {
      for (const double tau : {0.05, 1.0, 20.0}) {
        PairOptions o = options(0.2);
        o.f_divergence = static_cast<FDivergence>(f);
        o.discopop_tau = tau;
        o.alpha = 0.5;
        for (const double chosen : ends) {
          for (const double rejected : ends) {
            const PairTerm t = pair_loss(loss, {chosen, rejected, 1.0, 1.0}, o);
            EXPECT_TRUE(std::isfinite(static_cast<float>(t.value))) << code << " " << f;
            EXPECT_TRUE(std::isfinite(static_cast<float>(t.slope_chosen))) << code << " " << f;
            EXPECT_TRUE(std::isfinite(static_cast<float>(t.slope_rejected))) << code << " " << f;
          }
        }
      }
    }
  }
}

TEST(LossTest, NothingCancelsNearZeroAndNothingUnderflowsEarly) {
  EXPECT_NEAR(js_score(1e-12) / 0.5e-12, 1.0, 1e-11);
  EXPECT_NEAR(js_score(-1e-12) / -0.5e-12, 1.0, 1e-11);
  EXPECT_NEAR(js_score(-900.0), kLog2 - 900.0, 1e-12);
  EXPECT_NEAR(nls(700.0).value / std::exp(-700.0), 1.0, 1e-12);
  EXPECT_NEAR(sigmoid_term(-700.0).slope / std::exp(-700.0), 1.0, 1e-12);
  EXPECT_NEAR(log1mexp(-1e-12) / std::log(1e-12), 1.0, 1e-12);
}

TEST(LossTest, NanStaysNan) {
  for (int code = 0; code < kLosses; ++code) {
    const PairLoss loss = static_cast<PairLoss>(code);
    if (sorts_batch(loss) || loss == PairLoss::kSft) continue;
    EXPECT_TRUE(std::isnan(pair_loss(loss, {NAN, -1.0, 1.0, 1.0}, options(0.1)).value)) << code;
  }
}

TEST(LossTest, UnpairedHandValues) {
  UnpairedOptions o{0.1, 0.5, 0.25, 2.0, 3.0};
  const auto sig = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  EXPECT_NEAR(unpaired_loss(UnpairedLoss::kKto, 1.5, true, o).value, 2.0 * (1 - sig(0.1)), 1e-15);
  EXPECT_NEAR(unpaired_loss(UnpairedLoss::kKto, 1.5, false, o).value, 3.0 * sig(0.1), 1e-15);
  EXPECT_NEAR(unpaired_loss(UnpairedLoss::kApoZeroUnpaired, 2.0, true, o).value,
              2.0 * (1 - sig(0.2)), 1e-15);
  EXPECT_NEAR(unpaired_loss(UnpairedLoss::kBco, 2.0, false, o).value, -3.0 * std::log(sig(0.05)),
              1e-14);
  for (const bool desirable : {true, false}) {
    for (int code = 0; code < static_cast<int>(UnpairedLoss::kCount); ++code) {
      const UnpairedLoss loss = static_cast<UnpairedLoss>(code);
      const double h = 1e-6;
      const double slope = (unpaired_loss(loss, 0.7 + h, desirable, o).value -
                            unpaired_loss(loss, 0.7 - h, desirable, o).value) /
                           (2 * h);
      EXPECT_NEAR(unpaired_loss(loss, 0.7, desirable, o).slope, slope, 1e-9) << code;
    }
  }
}

// Outputs of the batch loop for three pairs.
struct Batch {
  std::vector<double> chosen{-1.0, -5.0, -2.0}, rejected{-3.0, -4.0, -2.0};
  std::vector<double> ref_chosen{-2.0, -2.0, -2.0}, ref_rejected{-2.5, -2.0, -3.0};
  double total = 0;
  std::vector<double> losses = std::vector<double>(3), rewards[2] = {losses, losses},
                      margins = losses, accuracies = losses, gradients = std::vector<double>(3 * 7);
  std::vector<int64_t> order = std::vector<int64_t>(3 * 4);

  void evaluate(const std::vector<LossItem>& items, const PairOptions& o, unsigned needs) {
    PairBatch<double> in;
    in.count = 3;
    in.chosen = chosen.data();
    in.rejected = rejected.data();
    in.ref_chosen = ref_chosen.data();
    in.ref_rejected = ref_rejected.data();
    PairResults<double> out;
    out.total = &total;
    out.losses = losses.data();
    out.chosen_rewards = rewards[0].data();
    out.rejected_rewards = rewards[1].data();
    out.margins = margins.data();
    out.accuracies = accuracies.data();
    out.gradients = gradients.data();
    out.order = order.data();
    evaluate_pairs(items, o, in, 1.0 / 3.0, needs, out);
  }
};

TEST(LossTest, ListsAreWeightedSumsAndRewardsAreScaledRatios) {
  Batch both, one, two;
  both.evaluate({{PairLoss::kSigmoid, 0.8, 0.0}, {PairLoss::kHinge, 0.2, 0.0}}, options(), 1);
  one.evaluate({{PairLoss::kSigmoid, 1.0, 0.0}}, options(), 1);
  two.evaluate({{PairLoss::kHinge, 1.0, 0.0}}, options(), 1);
  EXPECT_NEAR(both.total, 0.8 * one.total + 0.2 * two.total, 1e-15);
  EXPECT_NEAR(both.gradients[1], 0.8 * one.gradients[1] + 0.2 * two.gradients[1], 1e-15);
  EXPECT_NEAR(both.rewards[0][0], 0.1, 1e-15);
  EXPECT_NEAR(both.rewards[1][0], -0.05, 1e-15);
  EXPECT_EQ(both.accuracies[0], 1.0);
}

TEST(LossTest, AotSortsEachSideAndItsGradientFollowsThePermutations) {
  // logp_c - logp_r = 2, -1, 0 and ref: 0.5, 0, 1; sorted differences: -1 - 0, 0 - 0.5, 2 - 1.
  Batch b;
  b.evaluate({{PairLoss::kAot, 1.0, 0.0}}, options(), kNeedLogps);
  const double d[] = {-1.0, -0.5, 1.0};
  for (size_t i = 0; i < 3; ++i) EXPECT_NEAR(b.losses[i], nls(0.1 * d[i]).value, 1e-15) << i;
  EXPECT_EQ(std::vector<int64_t>(b.order.begin(), b.order.begin() + 6),
            (std::vector<int64_t>{1, 2, 0, 1, 0, 2}));

  GradientScale<double> in;
  in.count = 3;
  in.needs = kNeedLogps;
  in.sorted = kSortedAot;
  in.gradients = b.gradients.data();
  in.order = b.order.data();
  in.grad_total = 1.0;
  std::vector<double> grads[4] = {b.losses, b.losses, b.losses, b.losses};
  double* const out[kInputs] = {grads[0].data(), grads[1].data(), grads[2].data(), grads[3].data(),
                                nullptr};
  scale_gradients(in, out);
  const int policy_position[] = {2, 0, 1}, reference_position[] = {1, 0, 2};
  for (size_t i = 0; i < 3; ++i) {
    const double policy = 0.1 * nls(0.1 * d[policy_position[i]]).slope;
    const double reference = 0.1 * nls(0.1 * d[reference_position[i]]).slope;
    EXPECT_NEAR(grads[0][i], policy, 1e-15);
    EXPECT_NEAR(grads[1][i], -policy, 1e-15);
    EXPECT_NEAR(grads[2][i], -reference, 1e-15);
    EXPECT_NEAR(grads[3][i], reference, 1e-15);
  }
}

TEST(LossTest, SortingKeepsTheOrderOfTiesAndPutsNanLast) {
  Batch b;
  b.chosen = {-1.0, NAN, -1.0};
  b.rejected = {-2.0, -2.0, -2.0};
  b.evaluate({{PairLoss::kAot, 1.0, 0.0}}, options(), kNeedLogps);
  EXPECT_EQ(std::vector<int64_t>(b.order.begin(), b.order.begin() + 3),
            (std::vector<int64_t>{0, 2, 1}));
}

TEST(LossTest, AnEmptyCompletionDividesByOne) {
  const double zero = 0.0, logp = -4.0;
  const int64_t none = 0, four = 4;
  double total = 0, cell[5] = {};
  PairBatch<double> in;
  in.count = 1;
  in.chosen = in.ref_chosen = in.ref_rejected = &zero;
  in.rejected = &logp;
  in.chosen_lengths = &none;
  in.rejected_lengths = &four;
  PairResults<double> out;
  out.total = &total;
  out.losses = &cell[0];
  out.chosen_rewards = &cell[1];
  out.rejected_rewards = &cell[2];
  out.margins = &cell[3];
  out.accuracies = &cell[4];
  evaluate_pairs({{PairLoss::kSigmoidNorm, 1.0, 0.0}}, options(), in, 1.0, 0, out);
  EXPECT_NEAR(total, nls(0.1).value, 1e-15);
}

}  // namespace
}  // namespace fusedpo
