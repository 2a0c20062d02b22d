// Batches of log-probs, the lists of losses over them, and what the emulated device and the CPU's
// loop make of these.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>

#include "cpu/loss_cpu.h"
#include "cuda/loss_cuda.h"
#include "token_scores.h"

namespace fusedpo {

inline constexpr int kLosses = static_cast<int>(PairLoss::kCount);
inline constexpr int64_t kCounts[] = {1, 2, 64, 255, 256, 257, 1000};

inline PairOptions options_of(double beta, double smoothing) {
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

inline unsigned sorted_of(const std::vector<LossItem>& items) {
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

}  // namespace fusedpo
