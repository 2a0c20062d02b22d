// The loss family on the emulated device against the formulas of docs/losses.md, written out once
// more.
#include "loss_batches.h"

namespace fusedpo {
namespace {

double log_sigmoid(double x) { return -std::log1p(std::exp(-x)); }
double logistic(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// docs/losses.md, as it is printed there. c, r: log-ratios or log-probs; m, n: lengths.
double formula(PairLoss loss, double c, double r, double m, double n, const PairOptions& o) {
  const double b = o.beta, e = o.label_smoothing, d = b * (c - r);
  const auto smoothed = [&](double x) { return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x); };
  const auto odds = [](double l) { return l - std::log(1 - std::exp(l)); };
  const auto alpha_reward = [&](double l) {
    return o.alpha == 0 ? l : (1 - std::exp(-o.alpha * l)) / o.alpha;
  };
  switch (loss) {
    case PairLoss::kSigmoid:
      return -log_sigmoid(d);
    case PairLoss::kCdpo:
    case PairLoss::kCpo:
      return smoothed(d);
    case PairLoss::kHinge:
    case PairLoss::kCpoHinge:
      return std::max(0.0, 1 - d);
    case PairLoss::kIpo:
    case PairLoss::kCpoIpo:
      return std::pow(c / m - r / n - 1 / (2 * b), 2);
    case PairLoss::kIpoSum:
      return std::pow(c - r - 1 / (2 * b), 2);
    case PairLoss::kExoPair: {
      const double q = logistic(d), p = logistic(-d);
      return q * (std::log(q) - std::log(1 - e)) + p * (std::log(p) - std::log(e));
    }
    case PairLoss::kNcaPair:
      return -log_sigmoid(b * c) - 0.5 * log_sigmoid(-b * c) - 0.5 * log_sigmoid(-b * r);
    case PairLoss::kRobust:
      return (-(1 - e) * log_sigmoid(d) + e * log_sigmoid(-d)) / (1 - 2 * e);
    case PairLoss::kBcoPair:
      return -log_sigmoid(b * c) - log_sigmoid(-b * r);
    case PairLoss::kSppoHard:
      return std::pow(c - 1 / (2 * b), 2) + std::pow(r + 1 / (2 * b), 2);
    case PairLoss::kApoZero:
      return 1 - logistic(b * c) + logistic(b * r);
    case PairLoss::kApoDown:
      return logistic(b * c) + 1 - logistic(d);
    case PairLoss::kDiscopop: {
      const double mix = logistic(d / o.discopop_tau);
      return -(1 - mix) * log_sigmoid(d) + mix * std::exp(-d);
    }
    case PairLoss::kSigmoidNorm:
      return -log_sigmoid(b * (c / m - r / n));
    case PairLoss::kSimpo:
      return smoothed(b * (c / m - r / n) - o.simpo_gamma);
    case PairLoss::kAlphapo:
      return smoothed(b * (alpha_reward(c / m) - alpha_reward(r / n)) - o.simpo_gamma);
    case PairLoss::kOrpo:
      return -b * log_sigmoid(odds(c / m) - odds(r / n));
    case PairLoss::kOrpoLogratio:
      return -b * log_sigmoid(c - r);
    default:
      return 0.0;
  }
}

TEST(LossFormulas, EveryLossIsItsFormula) {
  Batch<double> batch(64, 8, 30.0);
  // Short enough for the printed formulas, which overflow.
  for (std::vector<double>* x :
       {&batch.chosen, &batch.rejected, &batch.ref_chosen, &batch.ref_rejected}) {
    for (double& v : *x) v /= 10.0;
  }
  for (size_t i = 0; i < 64; ++i) {
    batch.chosen_lengths[i] = 5 + static_cast<int64_t>(i);
    batch.rejected_lengths[i] = 70 - static_cast<int64_t>(i);
  }
  PairOptions o = options_of(0.3, 0.2);
  o.alpha = 0.4;
  o.discopop_tau = 0.7;
  for (int code = 0; code < kLosses; ++code) {
    const auto loss = static_cast<PairLoss>(code);
    if (sorts_batch(loss)) continue;
    const auto got = on_device<double>({{loss, 0.7, 0.5}}, o, batch, false, true, 1.0 / 64, 31u, 3);
    double total = 0.0;
    for (size_t i = 0; i < 64; ++i) {
      const auto m = static_cast<double>(batch.chosen_lengths[i]),
                 n = static_cast<double>(batch.rejected_lengths[i]);
      const bool reference = has_reference(loss);
      const double c = batch.chosen[i] - (reference ? batch.ref_chosen[i] : 0.0),
                   r = batch.rejected[i] - (reference ? batch.ref_rejected[i] : 0.0);
      const double w = 0.7 * batch.weights[i];
      const double want = w * (formula(loss, c, r, m, n, o) + 0.5 * batch.nll[i]);
      total += want / 64;
      EXPECT_NEAR(got->losses.host()[i], want, 1e-10 * (1 + std::fabs(want))) << code << " " << i;
      EXPECT_EQ(got->accuracies.host()[i], got->margins.host()[i] > 0 ? 1.0 : 0.0);
      // Derivatives of the formula by central differences; not at a hinge's corner.
      const double h = 1e-5;
      const double by_c =
          w * (formula(loss, c + h, r, m, n, o) - formula(loss, c - h, r, m, n, o)) / (2 * h);
      const double by_r =
          w * (formula(loss, c, r + h, m, n, o) - formula(loss, c, r - h, m, n, o)) / (2 * h);
      const std::vector<double> g = got->gradients.host();
      EXPECT_NEAR(g[i], by_c, 2e-6 * (1 + std::fabs(by_c))) << code << " " << i;
      EXPECT_NEAR(g[64 + i], by_r, 2e-6 * (1 + std::fabs(by_r))) << code << " " << i;
      EXPECT_EQ(g[2 * 64 + i], reference ? -g[i] : 0.0) << code;
      EXPECT_EQ(g[3 * 64 + i], reference ? -g[64 + i] : 0.0) << code;
      EXPECT_NEAR(g[4 * 64 + i], 0.5 * w, 1e-15) << code;
    }
    EXPECT_NEAR(got->total.host()[0], total, 1e-9 * (1 + std::fabs(total))) << code;
  }
  cuda_host::set_seed(0);
}

// aot: sort both sides, compare place by place.
TEST(LossFormulas, SortedLossesCompareTheSortedSides) {
  const Batch<double> batch(64, 9, 5.0);
  const PairOptions o = options_of(0.3, 0.2);
  for (const PairLoss loss : {PairLoss::kAot, PairLoss::kAotUnpaired}) {
    std::vector<double> up(64), down(64);
    for (size_t i = 0; i < 64; ++i) {
      const bool paired = loss == PairLoss::kAot;
      up[i] = batch.chosen[i] - (paired ? batch.rejected[i] : batch.ref_chosen[i]);
      down[i] = (paired ? batch.ref_chosen[i] : batch.rejected[i]) - batch.ref_rejected[i];
    }
    std::sort(up.begin(), up.end());
    std::sort(down.begin(), down.end());
    const auto got = on_device<double>({{loss, 1.0, 0.0}}, o, batch, false, false, 1.0, 15u, 3);
    for (size_t i = 0; i < 64; ++i) {
      const double x = o.beta * (up[i] - down[i]);
      EXPECT_NEAR(got->losses.host()[i], -0.8 * log_sigmoid(x) - 0.2 * log_sigmoid(-x), 1e-12) << i;
    }
  }
  cuda_host::set_seed(0);
}

TEST(LossFormulas, UnpairedLossesAreTheirFormulas) {
  const Batch<double> batch(64, 8, 6.0);
  std::vector<uint8_t> flags;
  for (size_t i = 0; i < 64; ++i) flags.push_back(i % 3 == 0);
  const DeviceArray<double> logps(batch.chosen), ref_logps(batch.ref_chosen);
  const DeviceArray<uint8_t> desirable(flags);
  const UnpairedOptions o{0.2, 1.5, -0.3, 0.9, 1.2};
  for (int code = 0; code < 3; ++code) {
    const DeviceArray<double> total(1), losses(64), rewards(64), gradients(128);
    cuda_host::set_seed(4);
    cuda::evaluate_unpaired<double>(
        static_cast<UnpairedLoss>(code), o, 64, logps.data(), ref_logps.data(),
        reinterpret_cast<const bool*>(desirable.data()), nullptr, 0.5, 5u, total.data(),
        losses.data(), rewards.data(), gradients.data(), kStream);
    double sum = 0.0;
    for (size_t i = 0; i < 64; ++i) {
      const double sign = flags[i] ? 1.0 : -1.0, w = flags[i] ? 0.9 : 1.2;
      const auto loss = [&](double r) {
        if (code == 0) return w * (1 - logistic(sign * o.beta * (r - o.kl)));
        if (code == 1) return w * (1 - logistic(sign * o.beta * r));
        return -w * log_sigmoid(sign * (o.beta * r - o.delta));
      };
      const double r = batch.chosen[i] - batch.ref_chosen[i],
                   slope = (loss(r + 1e-5) - loss(r - 1e-5)) / 2e-5;
      sum += loss(r);
      EXPECT_NEAR(losses.host()[i], loss(r), 1e-12) << code;
      EXPECT_NEAR(rewards.host()[i], 0.2 * r, 1e-12) << code;
      EXPECT_NEAR(gradients.host()[i], slope, 1e-8) << code;
      EXPECT_EQ(gradients.host()[64 + i], -gradients.host()[i]) << code;
    }
    EXPECT_NEAR(total.host()[0], 0.5 * sum, 1e-10) << code;
  }
  cuda_host::set_seed(0);
}

}  // namespace
}  // namespace fusedpo
