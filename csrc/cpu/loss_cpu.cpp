#include "cpu/loss_cpu.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace fusedpo {
namespace {

// Row i of a [rows, count] matrix goes to input i when it is wanted.
template <typename T>
void assign_rows(unsigned needs, T* matrix, int64_t count, T* (&rows)[kInputs]) {
  for (int i = 0; i < kInputs; ++i) {
    const bool wanted = matrix != nullptr && (needs >> i & 1u) != 0;
    rows[i] = wanted ? matrix : nullptr;
    if (wanted) matrix += count;
  }
}

template <typename T>
void store(T* row, int64_t i, double value) {
  if (row != nullptr) row[i] = static_cast<T>(value);
}

// Completions without a token divide by 1: their log-prob is 0, and stays so.
double length_of(const int64_t* lengths, int64_t i) {
  return lengths == nullptr || lengths[i] < 1 ? 1.0 : static_cast<double>(lengths[i]);
}

// The stable ascending order of `values`, NaN last.
void sort_order(const std::vector<double>& values, int64_t* order) {
  const auto count = static_cast<int64_t>(values.size());
  std::iota(order, order + count, int64_t{0});
  std::stable_sort(order, order + count, [&](int64_t i, int64_t j) {
    const double a = values[static_cast<size_t>(i)], b = values[static_cast<size_t>(j)];
    return a < b || (std::isnan(b) && !std::isnan(a));
  });
}

// Adds a loss that sorts the batch to the sum of each position; writes its slopes and its orders.
template <typename T>
void add_sorted(SortedLoss sorted, double weight, const PairOptions& options,
                const PairBatch<T>& batch, std::vector<double>& sums, T* slopes, int64_t* order) {
  const auto n = static_cast<size_t>(batch.count);
  std::vector<double> up(n), down(n);
  for (size_t i = 0; i < n; ++i) {
    const double chosen = batch.chosen[i], rejected = batch.rejected[i];
    const double ref_chosen = batch.ref_chosen[i], ref_rejected = batch.ref_rejected[i];
    const bool policy_against_reference = sorted == kSortedAot;
    up[i] = chosen - (policy_against_reference ? rejected : ref_chosen);
    down[i] = (policy_against_reference ? ref_chosen : rejected) - ref_rejected;
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
  T* rows[kInputs];
  assign_rows(needs, out.gradients, batch.count, rows);
  bool with_reference = false, uses_nll = false;
  double sorted_weight[2] = {0.0, 0.0};
  for (const LossItem& item : items) {
    with_reference |= has_reference(item.loss);
    uses_nll |= item.nll_weight != 0.0;
    if (item.loss == PairLoss::kAot) sorted_weight[0] += item.weight;
    if (item.loss == PairLoss::kAotUnpaired) sorted_weight[1] += item.weight;
  }

  // Sorted losses come first: they fill the sums by position, where the loop below adds the others.
  std::vector<double> sorted_sums;
  const unsigned sorted = sorted_losses(items.data(), static_cast<int64_t>(items.size()));
  if (sorted != 0) {
    sorted_sums.assign(static_cast<size_t>(batch.count), 0.0);
    T* slopes =
        out.gradients == nullptr ? nullptr : out.gradients + count_bits(needs) * batch.count;
    int64_t* order = out.order;
    for (const SortedLoss one : {kSortedAot, kSortedAotUnpaired}) {
      if ((sorted & one) == 0) continue;
      add_sorted(one, sorted_weight[one == kSortedAot ? 0 : 1], options, batch, sorted_sums, slopes,
                 order);
      order += 2 * batch.count;
      if (slopes != nullptr) slopes += batch.count;
    }
  }

  double total = 0.0;
  for (int64_t i = 0; i < batch.count; ++i) {
    PairInput policy{batch.chosen[i], batch.rejected[i], length_of(batch.chosen_lengths, i),
                     length_of(batch.rejected_lengths, i)};
    PairInput ratio = policy;
    if (with_reference) {
      ratio.chosen -= static_cast<double>(batch.ref_chosen[i]);
      ratio.rejected -= static_cast<double>(batch.ref_rejected[i]);
    }
    const double nll = uses_nll ? static_cast<double>(batch.chosen_nll[i * batch.nll_stride]) : 0.0;

    // Slopes by the log-ratios also belong, negated, to the references; the others do not.
    double sum = sorted == 0 ? 0.0 : sorted_sums[static_cast<size_t>(i)];
    double ratio_chosen = 0.0, ratio_rejected = 0.0, free_chosen = 0.0, free_rejected = 0.0;
    double slope_nll = 0.0;
    for (const LossItem& item : items) {
      if (item.nll_weight != 0.0) {
        sum += item.weight * item.nll_weight * nll;
        slope_nll += item.weight * item.nll_weight;
      }
      if (sorts_batch(item.loss)) continue;
      const bool is_ratio = has_reference(item.loss);
      const PairTerm term = pair_loss(item.loss, is_ratio ? ratio : policy, options);
      sum += item.weight * term.value;
      (is_ratio ? ratio_chosen : free_chosen) += item.weight * term.slope_chosen;
      (is_ratio ? ratio_rejected : free_rejected) += item.weight * term.slope_rejected;
    }
    const double w =
        batch.pair_weights == nullptr ? 1.0 : static_cast<double>(batch.pair_weights[i]);
    total += w * sum;
    out.losses[i] = static_cast<T>(w * sum);
    store(rows[0], i, w * (ratio_chosen + free_chosen));
    store(rows[1], i, w * (ratio_rejected + free_rejected));
    store(rows[2], i, -w * ratio_chosen);
    store(rows[3], i, -w * ratio_rejected);
    store(rows[4], i, w * slope_nll);

    // Among losses without reference the first one says what a reward is.
    double chosen_reward = options.beta * ratio.chosen,
           rejected_reward = options.beta * ratio.rejected;
    if (!with_reference) {
      chosen_reward = reward(items[0].loss, policy.chosen, policy.chosen_length, options);
      rejected_reward = reward(items[0].loss, policy.rejected, policy.rejected_length, options);
    }
    out.chosen_rewards[i] = static_cast<T>(chosen_reward);
    out.rejected_rewards[i] = static_cast<T>(rejected_reward);
    out.margins[i] = static_cast<T>(chosen_reward - rejected_reward);
    out.accuracies[i] = static_cast<T>(chosen_reward > rejected_reward ? 1.0 : 0.0);
  }
  *out.total = static_cast<T>(scale * total);
}

template <typename T>
void evaluate_unpaired(UnpairedLoss loss, const UnpairedOptions& options, int64_t count,
                       const T* logps, const T* ref_logps, const bool* desirable, double scale,
                       unsigned needs, T* total, T* losses, T* rewards, T* gradients) {
  T* rows[kInputs];
  assign_rows(needs, gradients, count, rows);
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double r = static_cast<double>(logps[i]) - static_cast<double>(ref_logps[i]);
    const Term term = unpaired_loss(loss, r, desirable[i], options);
    sum += term.value;
    losses[i] = static_cast<T>(term.value);
    rewards[i] = static_cast<T>(options.beta * r);
    store(rows[0], i, term.slope);
    store(rows[2], i, -term.slope);
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
    // Inputs with a plus and a minus sign on the first order, then on the second.
    const int signs[2][4] = {{0, 1, 3, 2}, {0, 2, 3, 1}};
    const int (&s)[4] = signs[one == kSortedAot ? 0 : 1];
    for (int64_t i = 0; i < n; ++i) {
      const double value = upstream(i) * static_cast<double>(slopes[i]);
      const int64_t up = order[i], down = order[n + i];
      const auto add = [](T* row, int64_t at, double x) {
        if (row != nullptr) row[at] = static_cast<T>(static_cast<double>(row[at]) + x);
      };
      add(out[s[0]], up, value);
      add(out[s[1]], up, -value);
      add(out[s[2]], down, value);
      add(out[s[3]], down, -value);
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
