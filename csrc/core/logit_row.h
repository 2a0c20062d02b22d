// What is asked of a row of logits and what is known of it, shared by the CPU and CUDA kernels.
#pragma once

#include <stdint.h>

#include "core/numeric.h"

namespace fusedpo {

// Which metrics a row needs besides logp; bits of the operators' `metrics` argument.
enum Metric : unsigned { kEntropy = 1, kLogSumSqProbs = 2, kMeanLogits = 4, kIsTop1 = 8 };

// z = softcap * tanh(scale * (x + bias) / softcap) / temperature; softcap 0 means none.
struct LogitTransform {
  double scale = 1.0;
  double softcap = 0.0;
  double temperature = 1.0;
};

// What is known of a row after some of its segments. Start from RowStats{}.
struct RowStats {
  double max = -__builtin_inf();  // the anchor m
  double rest = 0.0;              // sum_{v != y} exp(z_v - m)
  double rest_z = 0.0;            // sum_{v != y} exp(z_v - m) (z_v - m)
  double rest_sq = 0.0;           // sum_{v != y} exp(z_v - m)^2
  double sum = 0.0;               // sum_v z_v
  double target = 0.0;            // z_y
  double target_slope =
      1.0;                // d z_y / d x_y over scale / temperature: 1 - tanh^2, 1 without softcap
  int64_t count = 0;      // values seen
  double compared = 0.0;  // z_y as the segment had it: what is_top1 compares
  double highest = -__builtin_inf();  // max of z_v over v != y
  bool seen = false;                  // the label's segment was added
  bool beaten = false;                // an earlier z_v >= z_y or a later one > z_y
};

// A finished row, in the compute type's precision once stored.
struct RowResult {
  double logp, entropy, log_sum_sq_probs, mean_logits;
  bool is_top1;
  double max, log_sum;  // m and log s
  double rest_share;    // 1 - p_y
};

// Coefficients of one row's gradient: d loss / d z_v = logp * d logp / d z_v + entropy * d entropy
// / d z_v.
struct RowGradient {
  double max, log_sum;
  double rest_share;    // 1 - p_y
  double grad_logp;     // d loss / d logp
  double grad_entropy;  // d loss / d entropy; 0 when nobody asked
  double entropy;       // used with grad_entropy only
};

}  // namespace fusedpo
