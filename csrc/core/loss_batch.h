// A batch of [B] log-probs, the losses asked of it and where results go: plain structs that the
// host loop and the CUDA kernel share. T is float or double.
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

FUSEDPO_HD inline int64_t count_bits(unsigned bits) {
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1) ++count;
  return count;
}

// Which losses of a list sort the batch (bits). Their derivatives follow the permutation, so each
// has one more row of `gradients`, by position in the sorted batch, and two rows of `order`.
enum SortedLoss : unsigned { kSortedAot = 1, kSortedAotUnpaired = 2 };

struct LossItem {
  PairLoss loss;
  double weight;
  double nll_weight;  // factor of chosen_nll within the loss
};

FUSEDPO_HD inline unsigned sorted_losses(const LossItem* items, int64_t count) {
  unsigned sorted = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (items[i].loss == PairLoss::kAot) sorted |= kSortedAot;
    if (items[i].loss == PairLoss::kAotUnpaired) sorted |= kSortedAotUnpaired;
  }
  return sorted;
}

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

}  // namespace fusedpo
