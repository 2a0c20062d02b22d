// A batch of [B] log-probs, the losses asked of it and where results go, and what is done with one
// pair or one completion: all that the host loop and the CUDA kernel share. T is float or double;
// the arithmetic is fp64 and is rounded once, when it is stored.
#pragma once

#include <cstdint>

#include "core/loss.h"

namespace fusedpo {

// Which inputs a derivative is wanted for (bits). Each wanted one is a row [B] of `gradients`, in
// this order. Unpaired losses use kNeedChosen for logps and kNeedRefChosen for ref_logps.
enum GradientNeed : unsigned {
  kNeedChosen = 1,
  kNeedRejected = 2,
  kNeedRefChosen = 4,
  kNeedRefRejected = 8,
  kNeedChosenNll = 16,
};
inline constexpr int kInputs = 5;
inline constexpr unsigned kNeedLogps = 15;

// Which losses of a list sort the batch (bits). Their derivatives follow the permutation, so each
// has one more row of `gradients`, by position in the sorted batch, and two rows of `order`.
enum SortedLoss : unsigned { kSortedAot = 1, kSortedAotUnpaired = 2 };

struct LossItem {
  PairLoss loss;
  double weight;
  double nll_weight;  // factor of chosen_nll within the loss
};

// The inputs [B]. Pointers to what no loss of the list needs may be null.
template <typename T>
struct PairBatch {
  int64_t count = 0;
  const T *chosen = nullptr, *rejected = nullptr;
  const T *ref_chosen = nullptr, *ref_rejected = nullptr;
  const int64_t *chosen_lengths = nullptr, *rejected_lengths = nullptr;
  const T* chosen_nll = nullptr;
  int64_t nll_stride = 1;  // 0: one value for all pairs
  const T* pair_weights = nullptr;
};

// Where results go, [B] unless said otherwise.
template <typename T>
struct PairResults {
  T* total = nullptr;  // one value: the sum of the losses, times `scale`
  T *losses = nullptr, *chosen_rewards = nullptr, *rejected_rewards = nullptr;
  T *margins = nullptr, *accuracies = nullptr;
  T* gradients = nullptr;    // [needs + sorted losses, B]: d losses[b] / d input[b]
  int64_t* order = nullptr;  // [2 x sorted losses, B]: permutations of the policy's or the chosen
                             // side, then of the reference's or the rejected side
};

// What backward got, and what forward has saved for it.
template <typename T>
struct GradientScale {
  int64_t count = 0;
  unsigned needs = 0, sorted = 0;
  const T* gradients = nullptr;
  const int64_t* order = nullptr;
  double grad_total = 0.0;         // upstream gradient of `total`, times its scale
  const T* grad_losses = nullptr;  // [B], or null
  bool sum_nll = false;            // chosen_nll was one value: its gradient is the sum
};

// Row i of a [rows, count] matrix goes to input i when it is wanted.
template <typename T>
struct InputRows {
  T* row[kInputs];

  FUSEDPO_HD InputRows(unsigned needs, T* matrix, int64_t count) {
    for (int i = 0; i < kInputs; ++i) {  // in the order of GradientNeed
      const bool wanted = matrix != nullptr && (needs >> i & 1u) != 0;
      row[i] = wanted ? matrix : nullptr;
      if (wanted) matrix += count;
    }
  }

  FUSEDPO_HD void set(int input, int64_t i, double value) const {
    if (row[input] != nullptr) row[input][i] = static_cast<T>(value);
  }
};

FUSEDPO_HD inline int64_t count_bits(unsigned bits) {
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1) ++count;
  return count;
}

// The rows of `gradients` that hold the slopes of sorting losses; null where nobody needs them.
template <typename T>
FUSEDPO_HD T* sorted_slopes(unsigned needs, T* gradients, int64_t count) {
  const bool wanted = gradients != nullptr && (needs & kNeedLogps) != 0;
  return wanted ? gradients + count_bits(needs) * count : nullptr;
}

// What a list of losses asks for as a whole.
struct ListTraits {
  bool with_reference = false, uses_nll = false;
  unsigned sorted = 0;                   // SortedLoss bits
  double sorted_weight[2] = {0.0, 0.0};  // of kSortedAot and kSortedAotUnpaired

  FUSEDPO_HD ListTraits(const LossItem* items, int count) {
    for (int k = 0; k < count; ++k) {
      with_reference |= has_reference(items[k].loss);
      uses_nll |= items[k].nll_weight != 0.0;
      if (!sorts_batch(items[k].loss)) continue;
      const bool unpaired = items[k].loss == PairLoss::kAotUnpaired;
      sorted |= unpaired ? kSortedAotUnpaired : kSortedAot;
      sorted_weight[unpaired ? 1 : 0] += items[k].weight;
    }
  }
};

// The two sides that a sorting loss sorts, for pair i.
template <typename T>
FUSEDPO_HD void sorted_sides(SortedLoss sorted, const PairBatch<T>& batch, int64_t i, double* up,
                             double* down) {
  const double chosen = batch.chosen[i], rejected = batch.rejected[i];
  const double ref_chosen = batch.ref_chosen[i], ref_rejected = batch.ref_rejected[i];
  const bool policy_against_reference = sorted == kSortedAot;
  *up = chosen - (policy_against_reference ? rejected : ref_chosen);
  *down = (policy_against_reference ? ref_chosen : rejected) - ref_rejected;
}

// The ascending order of a sorted side: NaN last, equal values by their index.
FUSEDPO_HD inline bool sorts_before(double a, int64_t i, double b, int64_t j) {
  if (a < b) return true;
  if (b < a) return false;
  const bool a_is_nan = !(a == a), b_is_nan = !(b == b);
  return a_is_nan == b_is_nan ? i < j : b_is_nan;
}

// Completions without a token divide by 1: their log-prob is 0, and stays so.
FUSEDPO_HD inline double length_of(const int64_t* lengths, int64_t i) {
  return lengths == nullptr || lengths[i] < 1 ? 1.0 : static_cast<double>(lengths[i]);
}

// Writes the results of pair i and returns its share of the total. `sorted_sum` is what sorting
// losses add at position i.
template <typename T>
FUSEDPO_HD double evaluate_pair(const LossItem* items, int count, const ListTraits& traits,
                                const PairOptions& options, const PairBatch<T>& batch,
                                double sorted_sum, const InputRows<T>& gradients, int64_t i,
                                const PairResults<T>& out) {
  const PairInput policy{static_cast<double>(batch.chosen[i]),
                         static_cast<double>(batch.rejected[i]), length_of(batch.chosen_lengths, i),
                         length_of(batch.rejected_lengths, i)};
  PairInput ratio = policy;
  if (traits.with_reference) {
    ratio.chosen -= static_cast<double>(batch.ref_chosen[i]);
    ratio.rejected -= static_cast<double>(batch.ref_rejected[i]);
  }
  const double nll =
      traits.uses_nll ? static_cast<double>(batch.chosen_nll[i * batch.nll_stride]) : 0.0;

  // Slopes by the log-ratios also belong, negated, to the references; the others do not.
  double sum = sorted_sum;
  double ratio_chosen = 0.0, ratio_rejected = 0.0, free_chosen = 0.0, free_rejected = 0.0;
  double slope_nll = 0.0;
  for (int k = 0; k < count; ++k) {
    const LossItem& item = items[k];
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
  const double w = batch.pair_weights == nullptr ? 1.0 : static_cast<double>(batch.pair_weights[i]);
  out.losses[i] = static_cast<T>(w * sum);
  gradients.set(0, i, w * (ratio_chosen + free_chosen));
  gradients.set(1, i, w * (ratio_rejected + free_rejected));
  gradients.set(2, i, -w * ratio_chosen);
  gradients.set(3, i, -w * ratio_rejected);
  gradients.set(4, i, w * slope_nll);

  // Among losses without reference the first one says what a reward is.
  double chosen_reward = options.beta * ratio.chosen;
  double rejected_reward = options.beta * ratio.rejected;
  if (!traits.with_reference) {
    chosen_reward = reward(items[0].loss, policy.chosen, policy.chosen_length, options);
    rejected_reward = reward(items[0].loss, policy.rejected, policy.rejected_length, options);
  }
  out.chosen_rewards[i] = static_cast<T>(chosen_reward);
  out.rejected_rewards[i] = static_cast<T>(rejected_reward);
  out.margins[i] = static_cast<T>(chosen_reward - rejected_reward);
  out.accuracies[i] = static_cast<T>(chosen_reward > rejected_reward ? 1.0 : 0.0);
  return w * sum;
}

// Writes the results of completion i and returns its loss.
template <typename T>
FUSEDPO_HD double evaluate_completion(UnpairedLoss loss, const UnpairedOptions& options,
                                      const T* logps, const T* ref_logps, const bool* desirable,
                                      const InputRows<T>& gradients, int64_t i, T* losses,
                                      T* rewards) {
  const double r = static_cast<double>(logps[i]) - static_cast<double>(ref_logps[i]);
  const Term term = unpaired_loss(loss, r, desirable[i], options);
  losses[i] = static_cast<T>(term.value);
  rewards[i] = static_cast<T>(options.beta * r);
  gradients.set(0, i, term.slope);
  gradients.set(2, i, -term.slope);
  return term.value;
}

// The inputs that a sorting loss adds `slope` to and subtracts it from at up_order[i], then at
// down_order[i].
struct SortedInputs {
  int up_plus, up_minus, down_plus, down_minus;
};

FUSEDPO_HD inline SortedInputs sorted_inputs(SortedLoss sorted) {
  return sorted == kSortedAot ? SortedInputs{0, 1, 3, 2} : SortedInputs{0, 2, 3, 1};
}

// Adds the derivative of a sorting loss at position i of the sorted batch. Orders are permutations,
// so positions never meet at one entry.
template <typename T>
FUSEDPO_HD void add_sorted_gradient(SortedLoss sorted, double value, int64_t up, int64_t down,
                                    T* const (&out)[kInputs]) {
  const SortedInputs inputs = sorted_inputs(sorted);
  const auto add = [&](int input, int64_t at, double x) {
    T* const row = out[input];
    if (row != nullptr) row[at] = static_cast<T>(static_cast<double>(row[at]) + x);
  };
  add(inputs.up_plus, up, value);
  add(inputs.up_minus, up, -value);
  add(inputs.down_plus, down, value);
  add(inputs.down_minus, down, -value);
}

}  // namespace fusedpo
