// What a row of logits should give: the definitions in extended precision, the error that the
// plain tensor expressions make, and the CPU kernels' results.
#pragma once

#include <cmath>
#include <vector>

#include "core/finish_row.h"
#include "cpu/row_kernels.h"
#include "cpu/row_stats.h"
#include "typed_array.h"

namespace fusedpo {

inline constexpr unsigned kAllMetrics = kEntropy | kLogSumSqProbs | kMeanLogits | kIsTop1;

// Plain formulas in the type F, in the order a tensor library evaluates them.
template <typename F>
struct Plain {
  F logp, entropy = 0, log_sum_sq_probs, mean = 0;
  bool is_top1 = true;
  F max, log_sum, rest_share, target_slope;
  std::vector<F> z, log_p, slope;  // slope: d z / d x

  // Sums over 8 lanes, as a vectorised loop does; the lanes are then added up.
  template <typename Term>
  static F sum(size_t n, Term term) {
    F lanes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (size_t i = 0; i < n; ++i) lanes[i % 8] += term(i);
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
           ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  }

  Plain(const std::vector<double>& x, size_t y, const LogitTransform& t = {},
        const std::vector<double>* bias = nullptr, const double* exact = nullptr) {
    const size_t n = x.size();
    z.resize(n);
    log_p.resize(n);
    slope.resize(n);
    const F k = F(t.scale) / F(t.temperature);
    size_t first_max = 0;
    F z_y = 0;
    for (size_t v = 0; v < n; ++v) {
      const auto apply = [&](F in) {
        const F a = F(t.scale) * (bias == nullptr ? in : in + F((*bias)[v]));
        const F tanh_a = t.softcap > 0 ? std::tanh(a / F(t.softcap)) : F(0);
        slope[v] = k * (1 - tanh_a) * (1 + tanh_a);
        return (t.softcap > 0 ? F(t.softcap) * tanh_a : a) / F(t.temperature);
      };
      z[v] = apply(F(x[v]));
      if (v == 0 || z[v] > z[first_max]) first_max = v;  // before the label's is made exact
      if (v == y) z_y = exact == nullptr ? z[v] : apply(F(*exact));
    }
    is_top1 = first_max == y;
    // The mean is that of the logits as they are stored.
    mean = sum(n, [&](size_t v) { return z[v]; }) / F(n);
    z[y] = z_y;
    max = z[0];
    for (const F v : z) max = v > max ? v : max;
    log_sum = std::log(sum(n, [&](size_t v) { return std::exp(z[v] - max); }));
    for (size_t v = 0; v < n; ++v) log_p[v] = (z[v] - max) - log_sum;
    logp = log_p[y];
    entropy =
        -sum(n, [&](size_t v) { return z[v] == -INFINITY ? F(0) : std::exp(log_p[v]) * log_p[v]; });
    F most = 2 * z[0];
    for (const F v : z) most = 2 * v > most ? 2 * v : most;
    log_sum_sq_probs =
        (most + std::log(sum(n, [&](size_t v) { return std::exp(2 * z[v] - most); }))) -
        2 * (max + log_sum);
    rest_share = sum(n, [&](size_t v) { return v == y ? F(0) : std::exp(log_p[v]); });
    target_slope = slope[y] / k;
  }
};

using Truth = Plain<long double>;

// The CPU kernels' results for the same row.
inline RowResult cpu_score(DType type, const void* x, size_t cols, int64_t label,
                           const LogitTransform& t = {}, const void* bias = nullptr,
                           const double* exact = nullptr, RowStats* stats_out = nullptr) {
  constexpr int64_t kSegment = 2048;
  const DType compute = result_of(type);
  RowStats stats;
  for (int64_t v = 0; v < static_cast<int64_t>(cols); v += kSegment) {
    const int64_t n = std::min(kSegment, static_cast<int64_t>(cols) - v);
    const char* b = static_cast<const char*>(bias);
    const Segment segment{
        static_cast<const char*>(x) + v * static_cast<int64_t>(item_size(type)), type,
        b == nullptr ? nullptr : b + v * static_cast<int64_t>(item_size(compute)), n, label - v};
    row_kernels().accumulate(compute, segment, t, kAllMetrics, exact, &stats, nullptr);
  }
  settle(&stats);
  if (stats_out != nullptr) *stats_out = stats;
  return finish_row(stats, static_cast<int64_t>(cols));
}

inline std::vector<double> cpu_gradient(DType type, const void* x, size_t cols, int64_t label,
                                        const RowGradient& g, const LogitTransform& t = {},
                                        const void* bias = nullptr) {
  constexpr int64_t kSegment = 2048;
  const DType compute = result_of(type);
  std::vector<double> out;
  std::vector<double> part(kSegment);
  for (int64_t v = 0; v < static_cast<int64_t>(cols); v += kSegment) {
    const int64_t n = std::min(kSegment, static_cast<int64_t>(cols) - v);
    const char* b = static_cast<const char*>(bias);
    const Segment segment{
        static_cast<const char*>(x) + v * static_cast<int64_t>(item_size(type)), type,
        b == nullptr ? nullptr : b + v * static_cast<int64_t>(item_size(compute)), n, label - v};
    row_kernels().gradient(compute, segment, t, g, part.data(), compute);
    for (int64_t i = 0; i < n; ++i)
      out.push_back(load(compute, part.data(), static_cast<size_t>(i)));
  }
  return out;
}

}  // namespace fusedpo
