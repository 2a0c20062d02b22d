// The loss family on the emulated device: bit for bit the CPU loop's values and derivatives (both
// run the same fp64 body).
#include "loss_batches.h"

namespace fusedpo {
namespace {

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

}  // namespace
}  // namespace fusedpo
