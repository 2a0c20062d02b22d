// The losses of one completion that is marked desirable or undesirable: value and derivative.
#pragma once

#include "core/loss_math.h"

namespace fusedpo {

// The numbers are the codes that Python sends.
enum class UnpairedLoss : int { kKto = 0, kApoZeroUnpaired = 1, kBco = 2, kCount = 3 };

struct UnpairedOptions {
  double beta;
  double kl;     // of kto, nats, already clamped to >= 0
  double delta;  // of bco, a reward
  double desirable_weight, undesirable_weight;
};

// kto's kl counts as 0 below 0 (NaN stays); bco's delta is any number.
FUSEDPO_HD inline UnpairedOptions with_shift(UnpairedOptions options, double shift) {
  options.kl = shift > 0.0 || shift != shift ? shift : 0.0;
  options.delta = shift;
  return options;
}

// r = logp - ref_logp in nats; the slope is the derivative by r.
FUSEDPO_HD inline Term unpaired_loss(UnpairedLoss loss, double r, bool desirable,
                                     const UnpairedOptions& o) {
  // Desirable completions go down a slope that undesirable ones go up.
  const double sign = desirable ? 1.0 : -1.0;
  const double weight = desirable ? o.desirable_weight : o.undesirable_weight;
  double x = o.beta * r;
  if (loss == UnpairedLoss::kKto) x = o.beta * (r - o.kl);
  if (loss == UnpairedLoss::kBco) x -= o.delta;
  // 1 - sigmoid(sign x) = sigmoid(-sign x) does not cancel.
  const Term f = loss == UnpairedLoss::kBco ? nls(sign * x) : sigmoid_term(-sign * x);
  const double inner = loss == UnpairedLoss::kBco ? sign : -sign;
  return {weight * f.value, weight * f.slope * inner * o.beta};
}

}  // namespace fusedpo
