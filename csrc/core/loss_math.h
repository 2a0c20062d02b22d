// Scalar functions of the loss family that stay finite and accurate where the plain expressions
// overflow, cancel or take the logarithm of a rounded zero. All arithmetic is fp64. Host and
// device: this file and the loss*.h beside it use <cmath> and nothing else of the C++ library.
#pragma once

#include <cmath>

#include "core/numeric.h"  // FUSEDPO_HD

namespace fusedpo {

// A function of one variable at one point.
struct Term {
  double value;
  double slope;  // the derivative
};

// Exponents are capped here, with a zero derivative past the cap: e^80 fits into fp32, and so does
// the square of e^40.
inline constexpr double kExponentCap = 80.0;
inline constexpr double kSquaredExponentCap = 40.0;

// The logistic function at x and at -x, its logarithms and derivatives, from one exponential.
class Logistic {
 public:
  FUSEDPO_HD explicit Logistic(double x) : x_(x), e_(std::exp(-std::fabs(x))) {}

  FUSEDPO_HD double p() const { return (x_ >= 0.0 ? 1.0 : e_) / (1.0 + e_); }  // sigmoid(x)
  FUSEDPO_HD double q() const { return (x_ >= 0.0 ? e_ : 1.0) / (1.0 + e_); }  // sigmoid(-x)
  FUSEDPO_HD double log1p_e() const { return std::log1p(e_); }
  // -log sigmoid(x) and -log sigmoid(-x), from log1p_e().
  FUSEDPO_HD double nlog_p(double log1p_e) const { return (x_ < 0.0 ? -x_ : 0.0) + log1p_e; }
  FUSEDPO_HD double nlog_q(double log1p_e) const { return (x_ > 0.0 ? x_ : 0.0) + log1p_e; }

 private:
  double x_, e_;
};

FUSEDPO_HD inline double sigmoid(double x) { return Logistic(x).p(); }

// log(1 - e^x) for x < 0. Each branch is used where its inner difference does not cancel.
FUSEDPO_HD FUSEDPO_OUTLINED inline double log1mexp(double x) {
  constexpr double kLog2 = 0.693147180559945309417;
  return x > -kLog2 ? std::log(-std::expm1(x)) : std::log1p(-std::exp(x));
}

// -log sigmoid(x). The derivative -sigmoid(-x) does not cancel as sigmoid(x) - 1 does.
FUSEDPO_HD FUSEDPO_OUTLINED inline Term nls(double x) {
  const Logistic l(x);
  return {l.nlog_p(l.log1p_e()), -l.q()};
}

// keep nls(x) + flip nls(-x)
FUSEDPO_HD FUSEDPO_OUTLINED inline Term mixed_nls(double x, double keep, double flip) {
  const Logistic l(x);
  const double log1p_e = l.log1p_e();
  return {keep * l.nlog_p(log1p_e) + flip * l.nlog_q(log1p_e), flip * l.p() - keep * l.q()};
}

FUSEDPO_HD inline Term smoothed_nls(double x, double epsilon) {
  return mixed_nls(x, 1.0 - epsilon, epsilon);
}

// sigmoid(x) and sigmoid'(x); 1 - sigmoid(x) is sigmoid_term(-x).
FUSEDPO_HD FUSEDPO_OUTLINED inline Term sigmoid_term(double x) {
  const Logistic l(x);
  return {l.p(), l.p() * l.q()};
}

// max(0, 1 - x). A NaN stays a NaN.
FUSEDPO_HD inline Term hinge(double x) {
  const double gap = 1.0 - x;
  return gap <= 0.0 ? Term{0.0, 0.0} : Term{gap, -1.0};
}

// (x - target)^2
FUSEDPO_HD inline Term squared(double x, double target) {
  return {(x - target) * (x - target), 2.0 * (x - target)};
}

// (e^(a x) - 1) / a with the exponent capped; x itself in the limit a = 0. Below |a| = 1/20 the cap
// falls with log|a|, so that the quotient, or its square, still fits into fp32.
FUSEDPO_HD FUSEDPO_OUTLINED inline Term scaled_expm1(double x, double a, double cap) {
  if (a == 0.0) return {x, 1.0};
  const double exponent = a * x;
  const double limit = cap + std::fmin(0.0, std::log(20.0 * std::fabs(a)));
  if (exponent > limit) return {std::expm1(limit) / a, 0.0};
  return {std::expm1(exponent) / a, std::exp(exponent)};
}

}  // namespace fusedpo
