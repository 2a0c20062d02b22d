// The f-divergence score s(r) of a log-ratio r = log pi(y|x) - log pi_ref(y|x) (arXiv 2309.16240),
// which takes the place of r in the losses that are functions of a difference of scores.
#pragma once

#include "core/loss_math.h"

namespace fusedpo {

// The numbers are the codes that Python sends.
enum class FDivergence : int { kReverseKl = 0, kForwardKl = 1, kJs = 2, kAlpha = 3 };

// log 2 + log_sigmoid(r), which is r / 2 near 0: written so that nothing cancels there.
FUSEDPO_HD FUSEDPO_OUTLINED inline double js_score(double r) {
  return r < 0.0 ? r - std::log1p(0.5 * std::expm1(r)) : -std::log1p(0.5 * std::expm1(-r));
}

FUSEDPO_HD FUSEDPO_OUTLINED inline Term f_score(FDivergence divergence, double alpha, double r,
                                                double cap) {
  switch (divergence) {
    case FDivergence::kForwardKl:
      return scaled_expm1(r, -1.0, cap);  // 1 - e^-r
    case FDivergence::kJs:
      return {js_score(r), sigmoid(-r)};
    case FDivergence::kAlpha:
      return scaled_expm1(r, std::fabs(alpha - 1.0) < 1e-6 ? 0.0 : alpha - 1.0, cap);
    case FDivergence::kReverseKl:
      break;
  }
  return {r, 1.0};
}

}  // namespace fusedpo
