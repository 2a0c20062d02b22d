// token_logps on CPU: one read of the logits forward; backward reads them once and writes once.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/finish_row.h"
#include "cpu/row_kernels.h"
#include "cpu/row_stats.h"
#include "ops/large.h"
#include "ops/row_outputs.h"
#include "ops/rows.h"

namespace fusedpo {
namespace {

constexpr int64_t kRowSegment = 2048;  // stays in L1 should it be swept twice
// A row is summed in stretches of this many columns, whoever sums them: few rows are shared out to
// all threads, and no bit depends on how.
constexpr int64_t kStretch = 4 * kRowSegment;
constexpr int64_t kFewRows = 64;  // up to here stretches are shared out, beyond it rows
// Stretches of one task, which take about as long as a thread takes to start.
constexpr int64_t kStretchGrain = 2;

// One stretch of a row, from its logits to its sums.
class Scorer {
 public:
  Scorer(const Rows& rows, const KeptRows& kept, DType type, double temperature, unsigned metrics)
      : rows_(rows),
        kept_(kept),
        type_(type),
        compute_(result_type(type)),
        transform_{1.0, 0.0, temperature},
        metrics_(metrics) {}

  int64_t stretches() const { return (rows_.cols() + kStretch - 1) / kStretch; }

  RowStats operator()(int64_t i, int64_t stretch) const {
    const char* x = static_cast<const char*>(rows_.row(kept_.position[static_cast<size_t>(i)]));
    const int64_t label = kept_.label[static_cast<size_t>(i)];
    RowStats s;
    s.max = guess(x + label * size_of(type_));
    const int64_t begin = stretch * kStretch, end = std::min(begin + kStretch, rows_.cols());
    for (int64_t v = begin; v < end; v += kRowSegment) {
      const int64_t n = std::min(kRowSegment, end - v);
      const Segment segment{x + v * size_of(type_), type_, nullptr, n, label - v};
      kernels_.accumulate(compute_, segment, transform_, metrics_, nullptr, &s, nullptr);
    }
    return s;
  }

 private:
  // The label's logit, or -inf, which is no guess.
  double guess(const void* x) const {
    double room;  // for a float or a double
    kernels_.convert(type_, x, compute_, compute_, &room, 1);
    const double z = value_at(&room, compute_, 0) / transform_.temperature;
    return std::isfinite(z) ? z : -INFINITY;
  }

  const Rows& rows_;
  const KeptRows& kept_;
  const DType type_, compute_;
  const LogitTransform transform_;
  const unsigned metrics_;
  const RowKernels& kernels_ = row_kernels();
};

// The same bits whichever branch runs: each forms the same sums and joins them in the same order.
template <typename F>
void for_each_row(const Scorer& score, int64_t count, int64_t vocab, const F& finish) {
  const int64_t stretches = score.stretches();
  if (count > kFewRows || stretches == 1) {
    torch::stable::parallel_for(0, count, row_grain(vocab), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        RowStats row = score(i, 0);
        for (int64_t j = 1; j < stretches; ++j) append(score(i, j), &row);
        finish(i, row);
      }
    });
    return;
  }
  std::vector<RowStats> parts(static_cast<size_t>(count * stretches));
  torch::stable::parallel_for(0, count * stretches, kStretchGrain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      parts[static_cast<size_t>(k)] = score(k / stretches, k % stretches);
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    RowStats row = parts[static_cast<size_t>(i * stretches)];
    for (int64_t j = 1; j < stretches; ++j) {
      append(parts[static_cast<size_t>(i * stretches + j)], &row);
    }
    finish(i, row);
  }
}

// [logps, entropy, log_sum_sq_probs, mean_logits, is_top1, stats]
using Result =
    std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, Tensor>;

Result token_logps(const Tensor& logits_in, const Tensor& labels, int64_t ignore_index,
                   double temperature, int64_t metric_bits, bool /*inplace_backward*/) {
  check_rows(logits_in, labels, "logits");
  const Tensor logits = with_dense_rows(logits_in);
  const DType type = dtype_of(logits), compute = result_type(type);
  const unsigned metrics = static_cast<unsigned>(metric_bits);
  const Rows rows(logits);
  const int64_t vocab = rows.cols();
  const KeptRows kept = kept_rows(labels, vocab, ignore_index);

  RowOutputs out(logits, labels, compute, metrics);
  Tensor stats = zeros_as(logits, {rows.count(), 3}, compute);
  void* stats_data = stats.mutable_data_ptr();
  const Scorer score(rows, kept, type, temperature, metrics);
  for_each_row(score, kept.count(), vocab, [&](int64_t i, RowStats& s) {
    settle(&s);
    const RowResult r = finish_row(s, vocab);
    out.set(kept.position[static_cast<size_t>(i)], r);
    set_value(stats_data, compute, 3 * i, r.max);
    set_value(stats_data, compute, 3 * i + 1, r.log_sum);
    set_value(stats_data, compute, 3 * i + 2, r.rest_share);
  });
  return {out.logps, out.entropy, out.log_sum_sq_probs, out.mean_logits, out.is_top1, stats};
}

// Row t of out = d loss / d logits row t; out may be logits.
void write_gradient(const OptionalTensor& grad_logps_in, const OptionalTensor& grad_entropy_in,
                    const Tensor& logits, const Tensor& labels, const OptionalTensor& entropy,
                    const Tensor& stats, int64_t ignore_index, double temperature, Tensor& out) {
  const DType type = dtype_of(logits), compute = result_type(type);
  const Rows in_rows(logits), out_rows(out);
  const int64_t vocab = in_rows.cols(), item = size_of(type);
  const KeptRows kept = kept_rows(labels, vocab, ignore_index);
  check_rows(logits, labels, "logits");
  check_saved(stats, labels.numel(), 3, compute, "stats");
  const OptionalTensor grad_logps = dense_gradient(grad_logps_in, labels, compute);
  const OptionalTensor grad_entropy =
      entropy ? dense_gradient(grad_entropy_in, labels, compute) : std::nullopt;
  const void* c_logps = grad_logps ? grad_logps->const_data_ptr() : nullptr;
  const void* c_entropy = grad_entropy ? grad_entropy->const_data_ptr() : nullptr;
  const void* h = entropy ? entropy->const_data_ptr() : nullptr;
  const void* stats_data = stats.const_data_ptr();
  const LogitTransform transform{1.0, 0.0, temperature};
  const RowKernels& kernels = row_kernels();

  // Which scored row a position is, or -1.
  std::vector<int64_t> scored(static_cast<size_t>(in_rows.count()), -1);
  for (int64_t i = 0; i < kept.count(); ++i) scored[static_cast<size_t>(kept.position[i])] = i;

  const auto write = [&](int64_t t, int64_t begin, int64_t end) {
    const int64_t i = scored[static_cast<size_t>(t)];
    char* to = static_cast<char*>(out_rows.row(t));
    RowGradient row{};
    if (i >= 0) {
      row.grad_logp = c_logps == nullptr ? 0.0 : value_at(c_logps, compute, t);
      row.grad_entropy = c_entropy == nullptr ? 0.0 : value_at(c_entropy, compute, t);
    }
    if (row.grad_logp == 0.0 && row.grad_entropy == 0.0) {  // ignored, or nothing upstream
      std::memset(to + begin * item, 0, static_cast<size_t>((end - begin) * item));
      return;
    }
    row.max = value_at(stats_data, compute, 3 * i);
    row.log_sum = value_at(stats_data, compute, 3 * i + 1);
    row.rest_share = value_at(stats_data, compute, 3 * i + 2);
    row.entropy = h == nullptr ? 0.0 : value_at(h, compute, t);
    const char* x = static_cast<const char*>(in_rows.row(t));
    for (int64_t v = begin; v < end; v += kRowSegment) {
      const int64_t n = std::min(kRowSegment, end - v);
      const Segment segment{x + v * item, type, nullptr, n, kept.label[i] - v};
      kernels.gradient(compute, segment, transform, row, to + v * item, type);
    }
  };
  const int64_t stretches = (vocab + kStretch - 1) / kStretch;
  torch::stable::parallel_for(0, in_rows.count() * stretches, kStretchGrain,
                              [&](int64_t a, int64_t b) {
                                for (int64_t k = a; k < b; ++k) {
                                  const int64_t begin = k % stretches * kStretch;
                                  write(k / stretches, begin, std::min(begin + kStretch, vocab));
                                }
                              });
}

Tensor token_logps_backward(const OptionalTensor& grad_logps, const OptionalTensor& grad_entropy,
                            const Tensor& logits_in, const Tensor& labels,
                            const OptionalTensor& entropy, const Tensor& stats,
                            int64_t ignore_index, double temperature) {
  const Tensor logits = with_dense_rows(logits_in);
  Tensor out = empty_large(logits, sizes_of(logits), dtype_of(logits));
  write_gradient(grad_logps, grad_entropy, logits, labels, entropy, stats, ignore_index,
                 temperature, out);
  return out;
}

void token_logps_backward_(const OptionalTensor& grad_logps, const OptionalTensor& grad_entropy,
                           Tensor logits, const Tensor& labels, const OptionalTensor& entropy,
                           const Tensor& stats, int64_t ignore_index, double temperature) {
  STD_TORCH_CHECK(logits.size(logits.dim() - 1) <= 1 || logits.stride(logits.dim() - 1) == 1,
                  "inplace_backward needs logits whose last dimension is contiguous");
  write_gradient(grad_logps, grad_entropy, logits, labels, entropy, stats, ignore_index,
                 temperature, logits);
}

}  // namespace
}  // namespace fusedpo

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  m.impl("token_logps", TORCH_BOX(&fusedpo::token_logps));
  m.impl("token_logps_backward", TORCH_BOX(&fusedpo::token_logps_backward));
  m.impl("token_logps_backward_", TORCH_BOX(&fusedpo::token_logps_backward_));
}
