// From the sums over a row to its results, in fp64. Not for the files compiled per instruction set.
#pragma once

#include <cmath>

#include "core/logit_row.h"

namespace fusedpo {

FUSEDPO_HD inline RowResult finish_row(const RowStats& s, int64_t vocab) {
  const double mean = s.sum / static_cast<double>(vocab);
  const bool is_top1 = s.seen && !s.beaten;
  if (!std::isfinite(s.max)) {  // nothing to normalise by: NaN, as in torch, in value and gradient
    const double nan = static_cast<double>(NAN);
    return {nan, nan, nan, mean, is_top1, s.max, nan, nan};
  }
  const double target = std::exp(s.target - s.max);  // 1 when the label is the maximum
  const double sum = s.rest + target;
  const bool label_is_max = s.target == s.max;
  RowResult r;
  r.log_sum = label_is_max ? std::log1p(s.rest) : std::log(sum);
  r.logp = (s.target - s.max) - r.log_sum;
  const double target_z = target == 0.0 ? 0.0 : target * (s.target - s.max);
  r.entropy = r.log_sum - (s.rest_z + target_z) / sum;
  const double log_sum_sq =
      label_is_max ? std::log1p(s.rest_sq) : std::log(s.rest_sq + target * target);
  r.log_sum_sq_probs = log_sum_sq - 2.0 * r.log_sum;
  r.mean_logits = mean;
  r.is_top1 = is_top1;
  r.max = s.max;
  r.rest_share = s.rest / sum;
  return r;
}

}  // namespace fusedpo
