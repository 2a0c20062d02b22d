// The loss family on the emulated device: bit for bit the CPU loop's values and derivatives (both
// run the same fp64 body), and the formulas of docs/losses.md written out once more.
#include "cuda/loss_cuda.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>

#include "cpu/loss_cpu.h"
#include "token_scores.h"

namespace fusedpo {
namespace {

constexpr int kLosses = static_cast<int>(PairLoss::kCount);
constexpr int64_t kCounts[] = {1, 2, 64, 255, 256, 257, 1000};

PairOptions options_of(double beta, double smoothing) {
  return {beta, smoothing, FDivergence::kReverseKl, 0.5, 0.05, 0.5, 0.0};
}

template <typename T>
DType type_of() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}

template <typename T>
std::vector<T> values_as(const std::vector<double>& x) {
  return std::vector<T>(x.begin(), x.end());
}

// A batch of log-probs on both sides.
template <typename T>
struct Batch {
  std::vector<T> chosen, rejected, ref_chosen, ref_rejected, nll, weights;
  std::vector<int64_t> chosen_lengths, rejected_lengths;

  Batch(int64_t count, unsigned seed, double spread = 30.0) {
    const auto n = static_cast<size_t>(count);
    const auto draw = [&](unsigned which, double scale, double centre) {
      std::vector<double> x = random_values(type_of<T>(), n, scale, seed + which);
      for (double& v : x) v = centre + v;
      return values_as<T>(x);
    };
    chosen = draw(0, spread, -120.0);
    rejected = draw(1, spread, -130.0);
    ref_chosen = draw(2, spread, -125.0);
    ref_rejected = draw(3, spread, -125.0);
    nll = draw(4, 0.2, 1.5);
    weights = draw(5, 0.1, 1.0);
    for (size_t i = 0; i < n; ++i) {
      chosen_lengths.push_back(static_cast<int64_t>((i * 13 + seed) % 90));  // some are 0
      rejected_lengths.push_back(static_cast<int64_t>((i * 29 + 7) % 120));
    }
    // Equal pairs: ties of rewards and of what is sorted.
    for (size_t i = 3; i < n; i += 7) {
      chosen[i] = rejected[i] = ref_chosen[i] = ref_rejected[i] = chosen[i - 1];
    }
  }

  PairBatch<T> view(bool one_nll, bool with_weights) const {
    PairBatch<T> b;
    b.count = static_cast<int64_t>(chosen.size());
    b.chosen = chosen.data();
    b.rejected = rejected.data();
    b.ref_chosen = ref_chosen.data();
    b.ref_rejected = ref_rejected.data();
    b.chosen_lengths = chosen_lengths.data();
    b.rejected_lengths = rejected_lengths.data();
    b.chosen_nll = nll.data();
    b.nll_stride = one_nll ? 0 : 1;
    b.pair_weights = with_weights ? weights.data() : nullptr;
    return b;
  }
};

// What one list of losses writes, in host or device memory.
template <typename T>
struct Results {
  DeviceArray<T> total, losses, chosen_rewards, rejected_rewards, margins, accuracies, gradients;
  DeviceArray<int64_t> order;

  Results(size_t n, size_t gradient_rows, size_t order_rows)
      : total(1),
        losses(n),
        chosen_rewards(n),
        rejected_rewards(n),
        margins(n),
        accuracies(n),
        gradients(gradient_rows * n),
        order(order_rows * n) {}

  PairResults<T> view() const {
    PairResults<T> r;
    r.total = total.data();
    r.losses = losses.data();
    r.chosen_rewards = chosen_rewards.data();
    r.rejected_rewards = rejected_rewards.data();
    r.margins = margins.data();
    r.accuracies = accuracies.data();
    r.gradients = gradients.size() == 0 ? nullptr : gradients.data();
    r.order = order.size() == 0 ? nullptr : order.data();
    return r;
  }
};

template <typename T>
bool same_bits(const DeviceArray<T>& a, const DeviceArray<T>& b) {
  return a.size() == b.size() && std::equal(a.data(), a.data() + a.size(), b.data(),
                                            [](T x, T y) { return x == y || (x != x && y != y); });
}

// Sums of up to 1000 fp64 terms in two orders, each rounded once to T.
template <typename T>
void expect_total(T got, T want, const std::string& what) {
  const double unit = sizeof(T) == 8 ? 1e-12 : 1.2e-7;
  if (std::isfinite(want)) {
    EXPECT_LE(distance(got, want), unit * std::fabs(static_cast<double>(want)) + 1e-300)
        << what << "total";
  } else {
    EXPECT_EQ(distance(got, want), 0.0) << what << "total";
  }
}

template <typename T>
void expect_same(const Results<T>& got, const Results<T>& want, const std::string& what) {
  EXPECT_TRUE(same_bits(got.losses, want.losses)) << what << "losses";
  EXPECT_TRUE(same_bits(got.chosen_rewards, want.chosen_rewards)) << what << "chosen rewards";
  EXPECT_TRUE(same_bits(got.rejected_rewards, want.rejected_rewards)) << what << "rejected rewards";
  EXPECT_TRUE(same_bits(got.margins, want.margins)) << what << "margins";
  EXPECT_TRUE(same_bits(got.accuracies, want.accuracies)) << what << "accuracies";
  EXPECT_TRUE(same_bits(got.gradients, want.gradients)) << what << "gradients";
  EXPECT_TRUE(same_bits(got.order, want.order)) << what << "order";
  expect_total(got.total.data()[0], want.total.data()[0], what);
}

unsigned sorted_of(const std::vector<LossItem>& items) {
  return ListTraits(items.data(), static_cast<int>(items.size())).sorted;
}

template <typename T>
std::unique_ptr<Results<T>> on_host(const std::vector<LossItem>& items, const PairOptions& o,
                                    const PairBatch<T>& b, double scale, unsigned needs) {
  const auto n = static_cast<size_t>(b.count),
             sorts = static_cast<size_t>(count_bits(sorted_of(items)));
  const bool slopes = (needs & kNeedLogps) != 0;
  auto r = std::make_unique<Results<T>>(
      n, static_cast<size_t>(count_bits(needs)) + (slopes ? sorts : 0), 2 * sorts);
  evaluate_pairs<T>(items, o, b, scale, needs, r->view());
  return r;
}

template <typename T>
std::unique_ptr<Results<T>> on_device(const std::vector<LossItem>& items, const PairOptions& o,
                                      const Batch<T>& batch, bool one_nll, bool with_weights,
                                      double scale, unsigned needs, uint64_t seed) {
  cuda::LossList list;
  list.count = static_cast<int>(items.size());
  std::copy(items.begin(), items.end(), list.items);
  const size_t n = batch.chosen.size(), sorts = static_cast<size_t>(count_bits(sorted_of(items)));
  const bool slopes = (needs & kNeedLogps) != 0;
  bool reference = false, lengths = false, nll = false;
  for (const LossItem& item : items) {
    reference |= has_reference(item.loss);
    lengths |= uses_lengths(item.loss);
    nll |= item.nll_weight != 0.0;
  }
  const DeviceArray<T> chosen(batch.chosen), rejected(batch.rejected), ref_chosen(batch.ref_chosen),
      ref_rejected(batch.ref_rejected);
  const DeviceArray<T> of_nll(one_nll ? std::vector<T>(1, batch.nll[0]) : batch.nll),
      weights(batch.weights);
  const DeviceArray<int64_t> chosen_lengths(batch.chosen_lengths),
      rejected_lengths(batch.rejected_lengths);
  PairBatch<T> b;
  b.count = static_cast<int64_t>(n);
  b.chosen = chosen.data();
  b.rejected = rejected.data();
  // What no loss of the list needs may be null.
  b.ref_chosen = reference ? ref_chosen.data() : nullptr;
  b.ref_rejected = reference ? ref_rejected.data() : nullptr;
  b.chosen_lengths = lengths ? chosen_lengths.data() : nullptr;
  b.rejected_lengths = lengths ? rejected_lengths.data() : nullptr;
  b.chosen_nll = nll ? of_nll.data() : nullptr;
  b.nll_stride = one_nll ? 0 : 1;
  b.pair_weights = with_weights ? weights.data() : nullptr;
  auto r = std::make_unique<Results<T>>(
      n, static_cast<size_t>(count_bits(needs)) + (slopes ? sorts : 0), 2 * sorts);
  const DeviceArray<double> scratch(sorts == 0 ? 0 : 4 * n);
  cuda_host::set_seed(seed);
  const cuda_host::LaunchLog log;
  cuda::evaluate_pairs<T>(list, o, b, scale, needs, r->view(),
                          sorts == 0 ? nullptr : scratch.data(), kStream);
  EXPECT_EQ(log.launches().size(), 1u);
  EXPECT_EQ(log.launches()[0].stream, kStream);
  return r;
}

template <typename T>
class Losses : public testing::Test {
 protected:
  void TearDown() override { cuda_host::set_seed(0); }

  // Both sides, the same bits.
  void compare(const std::vector<LossItem>& items, const PairOptions& o, const Batch<T>& batch,
               bool one_nll, bool with_weights, unsigned needs, uint64_t seed,
               const std::string& what) {
    const auto want = on_host<T>(items, o, batch.view(one_nll, with_weights), 0.125, needs);
    const auto got = on_device<T>(items, o, batch, one_nll, with_weights, 0.125, needs, seed);
    expect_same(*got, *want, what + ": ");
  }
};

using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(Losses, Types);

TYPED_TEST(Losses, EveryLossAndOptionHasTheBitsOfTheCpu) {
  uint64_t seed = 0;
  for (int code = 0; code < kLosses; ++code) {
    const auto loss = static_cast<PairLoss>(code);
    const bool divergence = !sorts_batch(loss) && has_reference(loss);
    for (int f = 0; f < (divergence ? 4 : 1); ++f) {
      for (const double smoothing : {0.1, 0.3}) {
        ++seed;
        PairOptions o = options_of(smoothing < 0.2 ? 0.1 : 0.9, smoothing);
        o.f_divergence = static_cast<FDivergence>(f);
        o.alpha = smoothing < 0.2 ? 0.0 : 0.4;
        const Batch<TypeParam> batch(65, static_cast<unsigned>(seed));
        const double nll_weight = code % 3 == 0 || loss == PairLoss::kSft ? 0.7 : 0.0;
        const unsigned needs = seed % 2 == 0 ? 31u : nll_weight != 0.0 ? 19u : 3u;
        this->compare({{loss, 0.8, nll_weight}}, o, batch, seed % 3 == 0,
                      !sorts_batch(loss) && seed % 2 == 0, needs, seed,
                      "loss " + std::to_string(code) + ", divergence " + std::to_string(f));
      }
    }
  }
}

TYPED_TEST(Losses, ListsOfEveryLengthAndBatchesOfEverySize) {
  for (const int64_t count : kCounts) {
    const Batch<TypeParam> batch(count, static_cast<unsigned>(count));
    std::vector<LossItem> all;
    for (int code = 0; code < kLosses; ++code) {
      if (!sorts_batch(static_cast<PairLoss>(code)))
        all.push_back({static_cast<PairLoss>(code), 0.1 + 0.05 * code, code % 2 * 0.3});
    }
    const PairOptions o = options_of(0.1, 0.1);
    const auto seed = static_cast<uint64_t>(count);
    this->compare(all, o, batch, false, true, 31u, seed, "all of " + std::to_string(count));
    this->compare({{PairLoss::kCpo, 1.0, 1.0}, {PairLoss::kSimpo, 0.5, 0.0}}, o, batch, true, false,
                  19u, seed, "without reference");
    this->compare({{PairLoss::kSigmoid, 1.0, 0.0}}, o, batch, false, false, 0u, seed,
                  "no derivative");
    for (const unsigned needs : {1u, 2u, 4u, 8u, 16u, 21u}) {
      this->compare({{PairLoss::kSigmoid, 1.0, 0.0}, {PairLoss::kSft, 0.2, 1.0}}, o, batch, false,
                    false, needs, seed, "needs " + std::to_string(needs));
    }
  }
  std::vector<LossItem> longest(cuda::kMaxLosses, {PairLoss::kSigmoid, 0.01, 0.0});
  longest.back() = {PairLoss::kHinge, 2.0, 0.0};
  this->compare(longest, options_of(0.1, 0.1), Batch<TypeParam>(40, 3), false, false, 3u, 5,
                "the longest list");
}

// Sorting losses: equal values keep their order, NaN comes last, and a list may hold both.
TYPED_TEST(Losses, SortedBatchesHaveTheOrderOfTheCpu) {
  const PairOptions o = options_of(0.1, 0.1);
  for (const int64_t count : kCounts) {
    for (const bool with_nan : {false, true}) {
      Batch<TypeParam> batch(count, static_cast<unsigned>(count) + 40);
      const auto n = static_cast<size_t>(count);
      for (size_t i = 0; i < n; ++i) {  // many ties
        batch.chosen[i] = std::round(batch.chosen[i] / 8);
        batch.rejected[i] = std::round(batch.rejected[i] / 8);
      }
      if (with_nan) {
        batch.chosen[n / 3] = std::numeric_limits<TypeParam>::quiet_NaN();
        batch.ref_rejected[n / 2] = std::numeric_limits<TypeParam>::quiet_NaN();
        batch.ref_chosen[n - 1] = std::numeric_limits<TypeParam>::infinity();
      }
      const auto seed = static_cast<uint64_t>(count + with_nan);
      const std::string what = std::to_string(count) + (with_nan ? " with NaN" : "");
      this->compare({{PairLoss::kAot, 1.0, 0.0}}, o, batch, false, false, 15u, seed, "aot " + what);
      this->compare({{PairLoss::kAotUnpaired, 0.5, 0.0}}, o, batch, false, false, 3u, seed,
                    "aot_unpaired " + what);
      this->compare({{PairLoss::kAot, 0.3, 0.0},
                     {PairLoss::kSigmoid, 1.0, 0.0},
                     {PairLoss::kAotUnpaired, 0.7, 0.0},
                     {PairLoss::kAot, 0.2, 0.0}},
                    o, batch, false, false, 31u, seed, "both " + what);
      this->compare({{PairLoss::kAot, 1.0, 0.0}}, o, batch, false, false, 0u, seed,
                    "no derivative " + what);
    }
  }
}

TYPED_TEST(Losses, NoOrderOfThreadsChangesABit) {
  const Batch<TypeParam> batch(300, 4);
  const std::vector<LossItem> items = {{PairLoss::kAot, 0.3, 0.0}, {PairLoss::kIpo, 1.0, 0.2}};
  const auto want =
      on_device<TypeParam>(items, options_of(0.1, 0.1), batch, false, false, 0.5, 31u, 0);
  for (const uint64_t seed : {1, 2, 3}) {
    const auto got =
        on_device<TypeParam>(items, options_of(0.1, 0.1), batch, false, false, 0.5, 31u, seed);
    expect_same(*got, *want, "seed " + std::to_string(seed) + ": ");
    EXPECT_EQ(got->total.data()[0], want->total.data()[0]);
  }
}

TYPED_TEST(Losses, BackwardScalesAndPermutesAsTheCpuDoes) {
  uint64_t seed = 0;
  for (const int64_t count : kCounts) {
    for (const int which : {0, 1, 2, 3}) {
      for (const bool of_losses : {false, true}) {
        ++seed;
        std::vector<LossItem> items = {{PairLoss::kSigmoid, 1.0, 0.5}};
        if (which & 1) items.push_back({PairLoss::kAot, 0.7, 0.0});
        if (which & 2) items.push_back({PairLoss::kAotUnpaired, 0.4, 0.0});
        const unsigned needs = seed % 3 == 0 ? 31u : seed % 3 == 1 ? 3u : 27u;
        const Batch<TypeParam> batch(count, static_cast<unsigned>(seed));
        const auto saved =
            on_host<TypeParam>(items, options_of(0.1, 0.1), batch.view(false, false), 1.0, needs);
        const auto n = static_cast<size_t>(count);
        const DeviceArray<TypeParam> slopes(saved->gradients.host()),
            of_each(values_as<TypeParam>(random_values(type_of<TypeParam>(), n, 1.0, 3)));
        const DeviceArray<int64_t> order(saved->order.host());
        const DeviceArray<TypeParam> grad_loss(std::vector<TypeParam>{TypeParam(0.75)});
        GradientScale<TypeParam> in;
        in.count = count;
        in.needs = needs;
        in.sorted = sorted_of(items);
        in.gradients = slopes.data();
        in.order = order.data();
        in.grad_losses = of_losses ? of_each.data() : nullptr;
        in.sum_nll = seed % 2 == 0;
        const bool with_total = !of_losses || seed % 4 < 2;
        std::vector<DeviceArray<TypeParam>*> wanted, got;
        TypeParam *want_rows[kInputs], *got_rows[kInputs];
        std::vector<std::unique_ptr<DeviceArray<TypeParam>>> all;
        for (int input = 0; input < kInputs; ++input) {
          const bool needed = (needs >> input & 1u) != 0;
          const size_t size = in.sum_nll && input == kInputs - 1 ? 1 : n;
          for (TypeParam** row : {&want_rows[input], &got_rows[input]}) {
            all.push_back(std::make_unique<DeviceArray<TypeParam>>(size));
            *row = needed ? all.back()->data() : nullptr;
          }
        }
        in.grad_total = with_total ? 0.75 * 0.5 : 0.0;
        scale_gradients<TypeParam>(in, want_rows);
        in.grad_total = 0.5;
        cuda_host::set_seed(seed);
        const cuda_host::LaunchLog log;
        cuda::scale_gradients<TypeParam>(in, with_total ? grad_loss.data() : nullptr, got_rows,
                                         kStream);
        ASSERT_EQ(log.launches().size(), 1u);
        EXPECT_EQ(log.launches()[0].stream, kStream);
        for (size_t input = 0; input < kInputs; ++input) {
          if (want_rows[input] == nullptr) continue;
          const DeviceArray<TypeParam>&want_row = *all[2 * input], &got_row = *all[2 * input + 1];
          const std::string what = std::to_string(count) + ", losses " + std::to_string(which) +
                                   ", input " + std::to_string(input);
          if (in.sum_nll && input == kInputs - 1) {
            EXPECT_LE(distance(got_row.data()[0], want_row.data()[0]),
                      (sizeof(TypeParam) == 8 ? 1e-13 : 1.2e-7) * static_cast<double>(n))
                << what;
          } else {
            EXPECT_TRUE(same_bits(got_row, want_row)) << what;
          }
        }
      }
    }
  }
}

TYPED_TEST(Losses, UnpairedLossesHaveTheBitsOfTheCpu) {
  uint64_t seed = 0;
  for (int code = 0; code < static_cast<int>(UnpairedLoss::kCount); ++code) {
    for (const int64_t count : kCounts) {
      for (const bool shifted : {false, true}) {
        ++seed;
        const auto n = static_cast<size_t>(count);
        const Batch<TypeParam> batch(count, static_cast<unsigned>(seed));
        std::vector<uint8_t> flags;
        for (size_t i = 0; i < n; ++i) flags.push_back(i * 5 % 3 == 0);
        const UnpairedOptions o{0.1, 1.5, -0.3, 0.9, 1.2};
        const TypeParam shift = TypeParam(0.4);
        UnpairedOptions of_host = o;
        if (shifted) of_host.kl = of_host.delta = static_cast<double>(shift);
        const unsigned needs = seed % 3 == 0 ? 5u : seed % 3 == 1 ? 1u : 4u;
        const size_t rows = static_cast<size_t>(count_bits(needs));
        const DeviceArray<TypeParam> logps(batch.chosen), ref_logps(batch.ref_chosen),
            shift_value(std::vector<TypeParam>{shift});
        const DeviceArray<uint8_t> desirable(flags);
        const DeviceArray<TypeParam> total(1), losses(n), rewards(n), gradients(rows * n),
            want_total(1), want_losses(n), want_rewards(n), want_gradients(rows * n);
        const auto loss = static_cast<UnpairedLoss>(code);
        const bool* const wanted = reinterpret_cast<const bool*>(desirable.data());
        evaluate_unpaired<TypeParam>(loss, of_host, count, logps.data(), ref_logps.data(), wanted,
                                     0.25, needs, want_total.data(), want_losses.data(),
                                     want_rewards.data(), want_gradients.data());
        cuda_host::set_seed(seed);
        const cuda_host::LaunchLog log;
        cuda::evaluate_unpaired<TypeParam>(loss, o, count, logps.data(), ref_logps.data(), wanted,
                                           shifted ? shift_value.data() : nullptr, 0.25, needs,
                                           total.data(), losses.data(), rewards.data(),
                                           gradients.data(), kStream);
        ASSERT_EQ(log.launches().size(), 1u);
        EXPECT_EQ(log.launches()[0].stream, kStream);
        const std::string what = "loss " + std::to_string(code) + " of " + std::to_string(count);
        EXPECT_TRUE(same_bits(losses, want_losses)) << what;
        EXPECT_TRUE(same_bits(rewards, want_rewards)) << what;
        EXPECT_TRUE(same_bits(gradients, want_gradients)) << what;
        expect_total(total.data()[0], want_total.data()[0], what + ": ");
      }
    }
  }
}

// ---- the formulas once more --------------------------------------------------------

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
