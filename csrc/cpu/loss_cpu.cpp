#include "cpu/loss_cpu.h"

#include <algorithm>
#include <numeric>

namespace fusedpo {
namespace {

void sort_order(const std::vector<double>& values, int64_t* order) {
  const auto count = static_cast<int64_t>(values.size());
  std::iota(order, order + count, int64_t{0});
  std::sort(order, order + count, [&](int64_t i, int64_t j) {
    return sorts_before(values[static_cast<size_t>(i)], i, values[static_cast<size_t>(j)], j);
  });
}

// Adds a loss that sorts the batch to the sum of each position; writes its slopes and its orders.
template <typename T>
void add_sorted(SortedLoss sorted, double weight, const PairOptions& options,
                const PairBatch<T>& batch, std::vector<double>& sums, T* slopes, int64_t* order) {
  const auto n = static_cast<size_t>(batch.count);
  std::vector<double> up(n), down(n);
  for (size_t i = 0; i < n; ++i) {
    sorted_sides(sorted, batch, static_cast<int64_t>(i), &up[i], &down[i]);
  }
  int64_t* const up_order = order;
  int64_t* const down_order = order + batch.count;
  sort_order(up, up_order);
  sort_order(down, down_order);
  for (size_t i = 0; i < n; ++i) {
    const double d =
        up[static_cast<size_t>(up_order[i])] - down[static_cast<size_t>(down_order[i])];
    const Term term = sorted_loss(d, options);
    sums[i] += weight * term.value;
    if (slopes != nullptr) slopes[i] = static_cast<T>(weight * term.slope);
  }
}

}  // namespace

template <typename T>
void evaluate_pairs(const std::vector<LossItem>& items, const PairOptions& options,
                    const PairBatch<T>& batch, double scale, unsigned needs,
                    const PairResults<T>& out) {
  const InputRows<T> gradients(needs, out.gradients, batch.count);
  const int count = static_cast<int>(items.size());
  const ListTraits traits(items.data(), count);

  // Sorted losses come first: they fill the sums by position, where the loop below adds the others.
  std::vector<double> sorted_sums;
  if (traits.sorted != 0) {
    sorted_sums.assign(static_cast<size_t>(batch.count), 0.0);
    T* slopes = sorted_slopes(needs, out.gradients, batch.count);
    int64_t* order = out.order;
    for (const SortedLoss one : {kSortedAot, kSortedAotUnpaired}) {
      if ((traits.sorted & one) == 0) continue;
      add_sorted(one, traits.sorted_weight[one == kSortedAot ? 0 : 1], options, batch, sorted_sums,
                 slopes, order);
      order += 2 * batch.count;
      if (slopes != nullptr) slopes += batch.count;
    }
  }

  double total = 0.0;
  for (int64_t i = 0; i < batch.count; ++i) {
    const double sorted_sum = sorted_sums.empty() ? 0.0 : sorted_sums[static_cast<size_t>(i)];
    total +=
        evaluate_pair(items.data(), count, traits, options, batch, sorted_sum, gradients, i, out);
  }
  *out.total = static_cast<T>(scale * total);
}

template <typename T>
void evaluate_unpaired(UnpairedLoss loss, const UnpairedOptions& options, int64_t count,
                       const T* logps, const T* ref_logps, const bool* desirable, double scale,
                       unsigned needs, T* total, T* losses, T* rewards, T* gradients) {
  const InputRows<T> rows(needs, gradients, count);
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    sum +=
        evaluate_completion(loss, options, logps, ref_logps, desirable, rows, i, losses, rewards);
  }
  *total = static_cast<T>(scale * sum);
}

template <typename T>
void scale_gradients(const GradientScale<T>& in, T* const (&out)[kInputs]) {
  const int64_t n = in.count;
  const auto upstream = [&](int64_t i) {
    return in.grad_total +
           (in.grad_losses == nullptr ? 0.0 : static_cast<double>(in.grad_losses[i]));
  };
  const T* slopes = in.gradients;
  for (int input = 0; input < kInputs; ++input) {
    if ((in.needs >> input & 1u) == 0) continue;
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double value = upstream(i) * static_cast<double>(slopes[i]);
      sum += value;
      if (!(in.sum_nll && input == kInputs - 1)) out[input][i] = static_cast<T>(value);
    }
    if (in.sum_nll && input == kInputs - 1) *out[input] = static_cast<T>(sum);
    slopes += n;
  }

  const int64_t* order = in.order;
  for (const SortedLoss one : {kSortedAot, kSortedAotUnpaired}) {
    if ((in.sorted & one) == 0) continue;
    for (int64_t i = 0; i < n; ++i) {
      add_sorted_gradient(one, upstream(i) * static_cast<double>(slopes[i]), order[i], order[n + i],
                          out);
    }
    order += 2 * n;
    slopes += n;
  }
}

#define FUSEDPO_INSTANTIATE(T)                                                                   \
  template void evaluate_pairs<T>(const std::vector<LossItem>&, const PairOptions&,              \
                                  const PairBatch<T>&, double, unsigned, const PairResults<T>&); \
  template void evaluate_unpaired<T>(UnpairedLoss, const UnpairedOptions&, int64_t, const T*,    \
                                     const T*, const bool*, double, unsigned, T*, T*, T*, T*);   \
  template void scale_gradients<T>(const GradientScale<T>&, T* const(&)[kInputs]);
FUSEDPO_INSTANTIATE(float)
FUSEDPO_INSTANTIATE(double)
#undef FUSEDPO_INSTANTIATE

}  // namespace fusedpo
