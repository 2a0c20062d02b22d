// The losses of one preference pair: value, and derivative with respect to its two log-probs.
// This is the only place where the mathematics of a paired loss stands in C++; the CPU loop calls
// it, and a CUDA kernel can. To add a loss: a PairLoss entry, a case in pair_loss(), and its entry
// in python/fusedpo/reference, which defines the name, the formula and what the loss needs.
#pragma once

#include "core/f_divergence.h"
#include "core/loss_math.h"

namespace fusedpo {

// The numbers are the codes that Python sends. Up to kLastWithReference a loss is a function of the
// log-ratios to the reference, after it of the policy's log-probs alone.
enum class PairLoss : int {
  kSigmoid = 0,
  kCdpo = 1,
  kHinge = 2,
  kIpo = 3,
  kIpoSum = 4,
  kExoPair = 5,
  kNcaPair = 6,
  kRobust = 7,
  kBcoPair = 8,
  kSppoHard = 9,
  kAot = 10,
  kAotUnpaired = 11,
  kApoZero = 12,
  kApoDown = 13,
  kDiscopop = 14,
  kSft = 15,
  kSigmoidNorm = 16,
  kLastWithReference = kSigmoidNorm,
  kCpo = 17,
  kCpoHinge = 18,
  kCpoIpo = 19,
  kSimpo = 20,
  kAlphapo = 21,
  kOrpo = 22,
  kOrpoLogratio = 23,
  kCount = 24,
};

FUSEDPO_HD inline bool has_reference(PairLoss loss) { return loss <= PairLoss::kLastWithReference; }
FUSEDPO_HD inline bool sorts_batch(PairLoss loss) {
  return loss == PairLoss::kAot || loss == PairLoss::kAotUnpaired;
}

FUSEDPO_HD inline bool uses_lengths(PairLoss loss) {
  switch (loss) {
    case PairLoss::kIpo:
    case PairLoss::kSigmoidNorm:
    case PairLoss::kCpoIpo:
    case PairLoss::kSimpo:
    case PairLoss::kAlphapo:
    case PairLoss::kOrpo:
      return true;
    default:
      return false;
  }
}

struct PairOptions {
  double beta;
  double label_smoothing;
  FDivergence f_divergence;
  double f_alpha;
  double discopop_tau;
  double simpo_gamma;
  double alpha;  // of alphapo
};

// What a loss sees of one pair. Lengths are completion tokens, at least 1.
struct PairInput {
  double chosen,
      rejected;  // log-ratio r = logp - ref_logp, or logp for a reference-free loss (nats)
  double chosen_length, rejected_length;
};

struct PairTerm {
  double value;
  double slope_chosen, slope_rejected;  // derivatives by PairInput::chosen and ::rejected
};

// q (log q - log(1-eps)) + p (log p - log eps), q = sigmoid(x), p = sigmoid(-x).
// The derivative uses log q - log p = x.
FUSEDPO_HD inline Term exo_term(double x, double epsilon) {
  const Logistic l(x);
  const double q = l.p(), p = l.q(), log1p_e = l.log1p_e();
  const double log_keep = std::log1p(-epsilon), log_flip = std::log(epsilon);
  return {-q * (l.nlog_p(log1p_e) + log_keep) - p * (l.nlog_q(log1p_e) + log_flip),
          q * p * (x - log_keep + log_flip)};
}

FUSEDPO_HD inline Term robust_term(double x, double epsilon) {
  const double scale = 1.0 / (1.0 - 2.0 * epsilon);
  return mixed_nls(x, scale * (1.0 - epsilon), -scale * epsilon);
}

// (1-m) nls(x) + m e^-x with m = sigmoid(x / tau). The product m e^-x is exp(log m - x), whose
// exponent is at most 0 below x = 0 for tau < 1; for tau >= 1 it grows without bound and is capped.
FUSEDPO_HD inline Term discopop_term(double x, double tau) {
  const Term logistic = nls(x);
  const Logistic l(x / tau);
  const double m = l.p(), rest = l.q();
  const double exponent = -l.nlog_p(l.log1p_e()) - x;
  const bool capped = exponent > kExponentCap;
  const double product = std::exp(capped ? kExponentCap : exponent);
  const double product_slope = capped ? 0.0 : product * (rest / tau - 1.0);
  return {rest * logistic.value + product,
          rest * logistic.slope - m * rest / tau * logistic.value + product_slope};
}

// log(p / (1 - p)) of the mean token probability p = e^l. At p = 1 it is infinite, so l is held at
// -1e-7, with a zero derivative past it.
FUSEDPO_HD inline Term log_odds(double l) {
  constexpr double kLargest = -1e-7;
  if (l > kLargest) return {kLargest - log1mexp(kLargest), 0.0};
  return {l - log1mexp(l), -1.0 / std::expm1(l)};
}

// alphapo's reward (1 - p^-a) / a of the mean token log-prob l; l itself for a = 0.
FUSEDPO_HD inline Term alpha_reward(double l, double a) {
  return scaled_expm1(l, -a, kExponentCap);
}

// f(scale * (chosen - rejected)) from f's value and slope and the two scores.
FUSEDPO_HD inline PairTerm of_difference(Term f, double scale, Term chosen, Term rejected) {
  return {f.value, f.slope * scale * chosen.slope, -(f.slope * scale * rejected.slope)};
}

// f(scale_c * chosen) + g(scale_r * rejected)
FUSEDPO_HD inline PairTerm separable(Term f, double scale_c, Term g, double scale_r) {
  return {f.value + g.value, f.slope * scale_c, g.slope * scale_r};
}

// A loss that is a function of a difference of f-divergence scores, per token where `normalized`.
FUSEDPO_HD inline PairTerm score_loss(PairLoss loss, const PairInput& in, const PairOptions& o) {
  const bool normalized = loss == PairLoss::kIpo || loss == PairLoss::kSigmoidNorm;
  const bool squares = loss == PairLoss::kIpo || loss == PairLoss::kIpoSum;
  const double cap = squares ? kSquaredExponentCap : kExponentCap;
  Term chosen = f_score(o.f_divergence, o.f_alpha, in.chosen, cap);
  Term rejected = f_score(o.f_divergence, o.f_alpha, in.rejected, cap);
  if (normalized) {
    chosen = {chosen.value / in.chosen_length, chosen.slope / in.chosen_length};
    rejected = {rejected.value / in.rejected_length, rejected.slope / in.rejected_length};
  }
  const double delta = chosen.value - rejected.value;
  if (squares) return of_difference(squared(delta, 0.5 / o.beta), 1.0, chosen, rejected);
  const double x = o.beta * delta;
  Term f;
  switch (loss) {
    case PairLoss::kCdpo:
      f = smoothed_nls(x, o.label_smoothing);
      break;
    case PairLoss::kHinge:
      f = hinge(x);
      break;
    case PairLoss::kExoPair:
      f = exo_term(x, o.label_smoothing);
      break;
    case PairLoss::kRobust:
      f = robust_term(x, o.label_smoothing);
      break;
    case PairLoss::kDiscopop:
      f = discopop_term(x, o.discopop_tau);
      break;
    default:  // sigmoid, sigmoid_norm
      f = nls(x);
  }
  return of_difference(f, o.beta, chosen, rejected);
}

// aot and aot_unpaired at one position of the sorted batch; d is the difference of the sorted
// values.
FUSEDPO_HD inline Term sorted_loss(double d, const PairOptions& o) {
  const Term f = smoothed_nls(o.beta * d, o.label_smoothing);
  return {f.value, f.slope * o.beta};
}

// Value and derivatives of one loss, without its chosen_nll term: that is linear, and the caller
// adds it (so sft, which is nothing else, is 0 here). Not for the losses that sort the batch.
FUSEDPO_HD FUSEDPO_OUTLINED inline PairTerm pair_loss(PairLoss loss, const PairInput& in,
                                                      const PairOptions& o) {
  const double b = o.beta;
  const Term chosen{in.chosen, 1.0}, rejected{in.rejected, 1.0};
  const Term mean_chosen{in.chosen / in.chosen_length, 1.0 / in.chosen_length};
  const Term mean_rejected{in.rejected / in.rejected_length, 1.0 / in.rejected_length};
  switch (loss) {
    case PairLoss::kNcaPair: {
      const Term g = nls(-b * in.rejected);
      return separable(mixed_nls(b * in.chosen, 1.0, 0.5), b, {0.5 * g.value, 0.5 * g.slope}, -b);
    }
    case PairLoss::kBcoPair:
      return separable(nls(b * in.chosen), b, nls(-b * in.rejected), -b);
    case PairLoss::kSppoHard:
      return separable(squared(in.chosen, 0.5 / b), 1.0, squared(in.rejected, -0.5 / b), 1.0);
    case PairLoss::kApoZero:
      return separable(sigmoid_term(-b * in.chosen), -b, sigmoid_term(b * in.rejected), b);
    case PairLoss::kApoDown: {
      const Term f = sigmoid_term(b * in.chosen);
      const Term g = sigmoid_term(-b * (in.chosen - in.rejected));
      return {f.value + g.value, b * (f.slope - g.slope), b * g.slope};
    }
    case PairLoss::kSft:
      return {0.0, 0.0, 0.0};
    case PairLoss::kCpo:
      return of_difference(smoothed_nls(b * (in.chosen - in.rejected), o.label_smoothing), b,
                           chosen, rejected);
    case PairLoss::kCpoHinge:
      return of_difference(hinge(b * (in.chosen - in.rejected)), b, chosen, rejected);
    case PairLoss::kCpoIpo:
      return of_difference(squared(mean_chosen.value - mean_rejected.value, 0.5 / b), 1.0,
                           mean_chosen, mean_rejected);
    case PairLoss::kSimpo: {
      const double x = b * (mean_chosen.value - mean_rejected.value) - o.simpo_gamma;
      return of_difference(smoothed_nls(x, o.label_smoothing), b, mean_chosen, mean_rejected);
    }
    case PairLoss::kAlphapo: {
      Term up = alpha_reward(mean_chosen.value, o.alpha);
      Term down = alpha_reward(mean_rejected.value, o.alpha);
      up.slope /= in.chosen_length;
      down.slope /= in.rejected_length;
      const double x = b * (up.value - down.value) - o.simpo_gamma;
      return of_difference(smoothed_nls(x, o.label_smoothing), b, up, down);
    }
    case PairLoss::kOrpo: {
      Term up = log_odds(mean_chosen.value), down = log_odds(mean_rejected.value);
      up.slope /= in.chosen_length;
      down.slope /= in.rejected_length;
      const Term f = nls(up.value - down.value);
      return of_difference({b * f.value, b * f.slope}, 1.0, up, down);
    }
    case PairLoss::kOrpoLogratio: {
      const Term f = nls(in.chosen - in.rejected);
      return of_difference({b * f.value, b * f.slope}, 1.0, chosen, rejected);
    }
    default:
      return score_loss(loss, in, o);
  }
}

// The reward that is reported for one completion when `loss` is the only one: beta times the
// log-ratio, or for a reference-free loss what its own trainer reports.
FUSEDPO_HD FUSEDPO_OUTLINED inline double reward(PairLoss loss, double logp, double length,
                                                 const PairOptions& o) {
  switch (loss) {
    case PairLoss::kCpoIpo:
    case PairLoss::kSimpo:
    case PairLoss::kOrpo:
      return o.beta * (logp / length);
    case PairLoss::kAlphapo:
      return o.beta * alpha_reward(logp / length, o.alpha).value;
    default:
      return o.beta * logp;
  }
}

}  // namespace fusedpo
