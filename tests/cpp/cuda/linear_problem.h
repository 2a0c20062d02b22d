// Rows of logits for linear_token_logps' memory-bound steps, on the host and on the emulated
// device.
#pragma once

#include "cuda/linear_logps.h"
#include "token_scores.h"

namespace fusedpo {

struct Transformed {
  const char* name;
  LogitTransform transform;
  bool bias;
};

const Transformed kTransforms[] = {
    {"plain", {1.0, 0.0, 1.0}, false},
    {"scaled", {0.7, 0.0, 1.6}, false},
    {"capped", {1.3, 30.0, 0.8}, false},
    {"biased", {1.0, 0.0, 1.2}, true},
    {"capped and biased", {0.5, 5.0, 1.5}, true},
    {"of negative scale", {-0.9, 0.0, 1.1}, false},
};

// Rows of logits in an order of their own, two of them without a position.
struct Problem {
  DType type;
  std::vector<RowCase> cases;  // by row; label kIgnore and position -1 past the scored ones
  std::vector<int64_t> position;
  std::vector<double> bias, exact;
  LogitTransform transform;
  size_t vocab, ld, positions;

  Problem(DType type_, size_t vocab_, const Transformed& t, bool with_exact, size_t gap,
          unsigned seed)
      : type(type_),
        cases(row_cases(type, vocab_, seed)),
        transform(t.transform),
        vocab(vocab_),
        ld(vocab_ + gap) {
    const size_t n = cases.size();
    positions = n + 5;
    for (size_t i = 0; i < n; ++i)
      position.push_back(static_cast<int64_t>((7 * i + 3) % positions));
    for (int extra = 0; extra < 2; ++extra) {
      cases.push_back({"no row", std::vector<double>(vocab, kNan), kIgnore, false});
      position.push_back(-1);
    }
    if (t.bias) bias = random_values(result_of(type), vocab, 1.0, seed + 5);
    if (!with_exact) return;
    for (const RowCase& row : cases) {
      const double x = row.scored ? row.x[static_cast<size_t>(row.label)] : 0.0;
      exact.push_back(rounded(result_of(type), x + (std::isfinite(x) ? 0.003 * x : 0.0)));
    }
  }

  size_t n() const { return cases.size(); }
  const std::vector<double>* bias_or_null() const { return bias.empty() ? nullptr : &bias; }
  const double* exact_or_null(size_t i) const { return exact.empty() ? nullptr : &exact[i]; }
  // Whether the definitions give numbers, or -inf: a cap makes infinite logits finite, a negative
  // scale turns masked ones into the largest.
  bool number(size_t i, const Truth& truth) const {
    const std::vector<double>& x = cases[i].x;
    const bool nan = std::any_of(x.begin(), x.end(), [](double v) { return std::isnan(v); });
    return cases[i].scored && !nan && std::isfinite(truth.max);
  }
  Truth truth(size_t i) const { return plain<long double>(i); }
  template <typename F>
  Plain<F> plain(size_t i) const {
    const auto y = static_cast<size_t>(cases[i].scored ? cases[i].label : 0);
    return Plain<F>(cases[i].x, y, transform, bias_or_null(),
                    cases[i].scored ? exact_or_null(i) : nullptr);
  }
};

// A problem's memory on the device.
struct OnDevice {
  TypedArray x, bias, exact;
  DeviceArray<int64_t> rows, labels;
  cuda::LogitRows view;

  explicit OnDevice(const Problem& p)
      : x(p.type, p.n() * p.ld),
        bias(result_of(p.type), p.bias),
        exact(result_of(p.type), p.exact),
        rows(p.position),
        labels(by_position(p)) {
    for (size_t i = 0; i < p.n(); ++i) {
      for (size_t v = 0; v < p.vocab; ++v) x.set(i * p.ld + v, p.cases[i].x[v]);
      if (p.ld > p.vocab) x.forbid(i * p.ld + p.vocab, (i + 1) * p.ld);
    }
    x.set_written();
    view.x = x.data();
    view.type = p.type;
    view.n = static_cast<int64_t>(p.n());
    view.ld = static_cast<int64_t>(p.ld);
    view.vocab = static_cast<int64_t>(p.vocab);
    view.rows = rows.data();
    view.labels = labels.data();
    view.ignore_index = kIgnore;
    view.bias = p.bias.empty() ? nullptr : bias.data();
    view.transform = p.transform;
    view.exact_targets = p.exact.empty() ? nullptr : exact.data();
  }

  static std::vector<int64_t> by_position(const Problem& p) {
    std::vector<int64_t> labels(p.positions, 0);  // of positions nobody asks for
    for (size_t i = 0; i < p.n(); ++i) {
      if (p.position[i] >= 0) labels[static_cast<size_t>(p.position[i])] = p.cases[i].label;
    }
    return labels;
  }
};

struct Scored {
  TypedArray logps, entropy, sum_sq, mean, stats;
  DeviceArray<uint8_t> top1;

  Scored(DType result, size_t positions, size_t n)
      : logps(result, positions),
        entropy(result, positions),
        sum_sq(result, positions),
        mean(result, positions),
        stats(result, 4 * n),
        top1(positions) {}

  std::vector<std::vector<char>> bytes() const {
    const auto flags = top1.host();
    return {logps.bytes(), entropy.bytes(), sum_sq.bytes(),
            mean.bytes(),  stats.bytes(),   {flags.begin(), flags.end()}};
  }
};

inline void score(const OnDevice& d, unsigned metrics, bool write_unit, uint64_t seed, Scored* s) {
  cuda::RowOutputs out;
  out.logps = s->logps.data();
  if (metrics & kEntropy) out.entropy = s->entropy.data();
  if (metrics & kLogSumSqProbs) out.log_sum_sq_probs = s->sum_sq.data();
  if (metrics & kMeanLogits) out.mean_logits = s->mean.data();
  if (metrics & kIsTop1) out.is_top1 = reinterpret_cast<bool*>(s->top1.data());
  cuda_host::set_seed(seed);
  const cuda_host::LaunchLog log;
  cuda::score_rows(d.view, metrics, write_unit, out, s->stats.data(), kStream);
  ASSERT_EQ(log.launches().size(), 1u);
  EXPECT_EQ(log.launches()[0].stream, kStream);
}

}  // namespace fusedpo
