// Rows of logits of every kind that has gone wrong somewhere, and how exact their results must be.
#pragma once

#include <limits>
#include <random>
#include <string>

#include "row_truth.h"

namespace fusedpo {

inline constexpr int64_t kIgnore = -100;
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
// Below, at and past one vector (2 to 8 values), one warp, one block (256) and one batch of its
// vectors; one value past a whole number of vectors.
inline constexpr size_t kVocabs[] = {1, 2, 7, 8, 9, 31, 127, 1000, 1001, 4097};

struct RowCase {
  std::string name;
  std::vector<double> x;  // values of the type
  int64_t label;
  bool scored = true;  // the label is a column
  bool number = true;  // the definitions give numbers, or -inf
  bool large = false;  // logits of thousands: their spacing is the error
};

inline std::vector<double> random_values(DType type, size_t n, double spread, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal(0.0, spread);
  std::vector<double> x(n);
  for (double& v : x) v = rounded(type, normal(engine));
  return x;
}

// 20 rows of `vocab` logits.
inline std::vector<RowCase> row_cases(DType type, size_t vocab, unsigned seed) {
  std::vector<RowCase> rows;
  std::mt19937 engine(seed);
  const auto last = static_cast<int64_t>(vocab) - 1;
  const auto any = [&] { return static_cast<int64_t>(engine() % vocab); };
  const auto add = [&](const char* name, int64_t label, double spread = 4.0) -> RowCase& {
    rows.push_back(
        {name, random_values(type, vocab, spread, static_cast<unsigned>(engine())), label});
    return rows.back();
  };
  const auto at = [](RowCase& row, int64_t v) -> double& { return row.x[static_cast<size_t>(v)]; };
  add("first label", 0);
  add("last label", last);
  add("middle label", last / 2);
  add("any label", any());
  add("flat logits", any(), 0.01);
  {
    RowCase& row = add("a confident label", any());
    at(row, row.label) = rounded(type, 37.0);
  }
  {
    RowCase& row = add("a label 50 nats below the maximum", any(), 2.0);
    at(row, row.label) = rounded(type, -50.0);
    at(row, (row.label + 1) % (last + 1)) = rounded(type, vocab == 1 ? -50.0 : 1.0);
  }
  {
    RowCase& row = add("rising logits", any(), 1.0);
    for (size_t v = 0; v < vocab; ++v) {
      row.x[v] = rounded(
          type, row.x[v] + 60.0 * static_cast<double>(v) / static_cast<double>(vocab) - 30.0);
    }
  }
  // Ties at the maximum: before the label, after it, and both in other places of the row.
  for (int kind = 0; kind < 4; ++kind) {
    RowCase& row = add(kind % 2 == 0 ? "a tie before the label" : "a tie after the label", 0);
    const int64_t low = any(), high = any(), near = std::min(low, high), far = std::max(low, high);
    row.label = kind % 2 == 0 ? far : near;
    at(row, near) = at(row, far) = rounded(type, 21.0);
    if (kind == 2 && far > 0) at(row, far - 1) = rounded(type, 21.0);
    if (kind == 3 && near < last) at(row, near + 1) = rounded(type, 21.0);
  }
  {
    RowCase& row = add("masked logits", any());
    for (int64_t v = 0; v <= last; ++v) {
      if (v != row.label && (v < last / 2 || v % 3 == 0)) at(row, v) = -kInfinity;
    }
  }
  {
    RowCase& row = add("a masked label", any());
    at(row, row.label) = -kInfinity;
    row.number = vocab > 1;
  }
  {
    RowCase& row = add("nothing but masked logits", any());
    row.x.assign(vocab, -kInfinity);
    row.number = false;
  }
  {
    RowCase& row = add("a NaN", any());
    at(row, any()) = kNan;
    row.number = false;
  }
  {
    RowCase& row = add("an infinite logit", any());
    at(row, any()) = kInfinity;
    row.number = false;
  }
  add("large logits", any(), type == DType::f16 ? 2000.0 : 5000.0).large = true;
  {
    RowCase& row = add("an ignored row", kIgnore);  // what it holds must not matter
    row.x.assign(vocab, kNan);
    row.scored = false;
  }
  {
    RowCase& row = add("a label that is no column", seed % 2 == 0 ? last + 1 : -1);
    row.scored = false;
  }
  return rows;
}

// What docs/design.md grants a result of the true value `want`: twice the error of the plain
// expression in the same type plus 4 ulp; where the caller's logits have 16 bits, the error of the
// plain expression in fp32 and the rounding of the stored result.
inline double allowed(DType type, double plain_error, double want, bool callers_logits = true) {
  // What lies below the normal range may be 0.
  const double unit = ulp(result_of(type), want) + (type == DType::f64 ? 0x1p-1022 : 0x1p-126);
  const bool wide = type == DType::f32 || type == DType::f64 || !callers_logits;
  return wide ? 2.0 * plain_error + 4.0 * unit : plain_error + unit;
}

inline double distance(long double a, long double b) {
  if (a == b || (std::isnan(a) && std::isnan(b))) return 0.0;
  const double d = static_cast<double>(std::fabs(a - b));
  return std::isnan(d) ? kInfinity : d;
}

// The largest errors that the plain expressions make over rows of one scale and size. A few rows
// can be lucky, so they are looked for in more rows than are scored.
inline constexpr unsigned kSamples = 4;

struct PlainErrors {
  double logp = 0, entropy = 0, log_sum_sq_probs = 0, mean = 0, log_sum = 0;

  template <typename F>
  void include(const Plain<F>& plain, const Truth& truth) {
    const auto worse = [](double& worst, long double a, long double b) {
      worst = std::max(worst, distance(a, b));
    };
    worse(logp, plain.logp, truth.logp);
    worse(entropy, plain.entropy, truth.entropy);
    worse(log_sum_sq_probs, plain.log_sum_sq_probs, truth.log_sum_sq_probs);
    if (std::isfinite(truth.mean)) worse(mean, plain.mean, truth.mean);
    worse(log_sum, plain.log_sum, truth.log_sum);
  }
};

// The relative error of the share 1 - p_label: the exponent of a term is rounded once, so its error
// grows with its distance from the anchor, which is the label's logit. Sums of fp32 are finished in
// fp64; those of fp64 are not finished in anything wider, so there the logits' own size counts.
inline double share_error(DType type, const Truth& truth, size_t label) {
  long double rest = -INFINITY, largest = 0;
  for (size_t v = 0; v < truth.z.size(); ++v) {
    if (v != label) rest = std::max(rest, truth.z[v]);
    if (std::isfinite(truth.z[v])) largest = std::max(largest, std::fabs(truth.z[v]));
  }
  const double gap =
      std::isfinite(rest) ? std::fabs(static_cast<double>(truth.z[label] - rest)) : 0.0;
  const double bits = 1.45 * std::min(gap, 60.0) + 8.0;
  return result_of(type) == DType::f64 ? (bits + 4.0 * static_cast<double>(largest)) * 0x1p-53
                                       : bits * 0x1p-24;
}

// What entropy and log_sum_sq_probs may be off beyond `allowed` where one logit has most of the
// mass and is not the label's: its exponential is exactly 1 in the plain expression, but here has
// an exponent of up to 12 bits, rounded once.
inline double of_dominating(DType type, const Truth& truth, size_t label) {
  const bool dominated = truth.max > truth.z[label] && truth.log_sum < 0.7L;
  return !dominated ? 0.0 : 12.0 * (result_of(type) == DType::f64 ? 0x1p-53 : 0x1p-24);
}

// d loss / d x of one row: the definition, and how far a result may be from it. `g`: upstream
// gradients and the entropy that forward has stored.
struct GradientTruth {
  std::vector<long double> value;
  std::vector<double> bound;

  // The plain expression rounds z, log p and its sums once each before the exponential, so a term
  // is off by their ulps, relatively; twice that is granted, and the rounding of what is stored. A
  // probability below the compute type's normal range may be 0.
  // `transform` takes part in that with each of its steps.
  GradientTruth(DType type, const Truth& t, size_t y, const RowGradient& g, double scale = 1.0,
                const LogitTransform* transform = nullptr) {
    const bool is_double = type == DType::f64;
    const double unit = is_double ? 0x1p-53 : 0x1p-24, tiny = is_double ? 0x1p-1022 : 0x1p-126;
    double largest = 0.0;
    for (const long double z : t.z) {
      if (std::isfinite(z)) largest = std::max(largest, static_cast<double>(std::fabs(z)));
    }
    const double steps =
        transform == nullptr ? 1.0 : 6.0;  // + bias, * scale, / cap, tanh, * cap, / T
    const bool capped = transform != nullptr && transform->softcap > 0;
    const double full_slope =
        transform == nullptr ? 0.0 : std::fabs(transform->scale / transform->temperature);
    const long double h = t.entropy;
    for (size_t v = 0; v < t.z.size(); ++v) {
      const bool masked = t.z[v] == -INFINITY;
      const long double p = masked ? 0.0L : std::exp(t.log_p[v]),
                        log_p = masked ? 0.0L : t.log_p[v];
      const long double of_logp = v == y ? t.rest_share : -p;
      const long double k = static_cast<long double>(scale) * t.slope[v];
      value.push_back(k * (g.grad_logp * of_logp - g.grad_entropy * p * (log_p + h)));
      const double abs_log_p = static_cast<double>(std::fabs(log_p));
      const double relative = unit * (abs_log_p + steps * largest + 2.0);
      const double of_sum = unit * (2.0 * abs_log_p + static_cast<double>(std::fabs(h)) +
                                    2.0 * steps * largest + 2.0);
      const double share = v == y ? share_error(type, t, y) * static_cast<double>(t.rest_share)
                                  : relative * static_cast<double>(p);
      const double error =
          std::fabs(static_cast<double>(k)) *
          (std::fabs(g.grad_logp) * share +
           std::fabs(g.grad_entropy) * static_cast<double>(p) *
               (relative * static_cast<double>(std::fabs(log_p + h)) + of_sum) +
           tiny * (std::fabs(g.grad_logp) +
                   std::fabs(g.grad_entropy) * (abs_log_p + static_cast<double>(std::fabs(h)))));
      // 1 - tanh^2 is a difference: its error does not fall with it.
      const long double of_slope = t.slope[v] == 0 ? 0.0L : value.back() / t.slope[v];
      const double slope_error =
          capped ? 4.0 * unit * full_slope * static_cast<double>(std::fabs(of_slope)) : 0.0;
      const bool wide = type == DType::f32 || is_double;
      bound.push_back(2.0 * (error + slope_error) +
                      (wide ? 4.0 : 0.51) * ulp(type, static_cast<double>(value.back())));
    }
  }
};

}  // namespace fusedpo
