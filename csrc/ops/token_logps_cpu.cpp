// token_logps on CPU: one read of the logits forward; backward reads them once and writes once.
#include <algorithm>
#include <cstring>

#include "core/finish_row.h"
#include "cpu/row_kernels.h"
#include "ops/row_outputs.h"
#include "ops/rows.h"

namespace fusedpo {
namespace {

constexpr int64_t kRowSegment = 2048;  // stays in L1 between the maximum and the sum

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
  const LogitTransform transform{1.0, 0.0, temperature};
  const RowKernels& kernels = row_kernels();
  torch::stable::parallel_for(0, kept.count(), row_grain(vocab), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* x = static_cast<const char*>(rows.row(kept.position[i]));
      RowStats s;
      for (int64_t v = 0; v < vocab; v += kRowSegment) {
        const int64_t n = std::min(kRowSegment, vocab - v);
        const Segment segment{x + v * size_of(type), type, nullptr, n, kept.label[i] - v};
        kernels.accumulate(compute, segment, transform, metrics, nullptr, &s, nullptr, compute);
      }
      const RowResult r = finish_row(s, vocab);
      out.set(kept.position[i], r);
      set_value(stats_data, compute, 3 * i, r.max);
      set_value(stats_data, compute, 3 * i + 1, r.log_sum);
      set_value(stats_data, compute, 3 * i + 2, r.rest_share);
    }
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

  torch::stable::parallel_for(0, in_rows.count(), row_grain(vocab), [&](int64_t a, int64_t b) {
    for (int64_t t = a; t < b; ++t) {
      const int64_t i = scored[static_cast<size_t>(t)];
      char* to = static_cast<char*>(out_rows.row(t));
      RowGradient row{};
      if (i >= 0) {
        row.grad_logp = c_logps == nullptr ? 0.0 : value_at(c_logps, compute, t);
        row.grad_entropy = c_entropy == nullptr ? 0.0 : value_at(c_entropy, compute, t);
      }
      if (row.grad_logp == 0.0 && row.grad_entropy == 0.0) {  // ignored, or nothing upstream
        std::memset(to, 0, static_cast<size_t>(vocab * item));
        continue;
      }
      row.max = value_at(stats_data, compute, 3 * i);
      row.log_sum = value_at(stats_data, compute, 3 * i + 1);
      row.rest_share = value_at(stats_data, compute, 3 * i + 2);
      row.entropy = h == nullptr ? 0.0 : value_at(h, compute, t);
      const char* x = static_cast<const char*>(in_rows.row(t));
      for (int64_t v = 0; v < vocab; v += kRowSegment) {
        const int64_t n = std::min(kRowSegment, vocab - v);
        const Segment segment{x + v * item, type, nullptr, n, kept.label[i] - v};
        kernels.gradient(compute, segment, transform, row, to + v * item, type);
      }
    }
  });
}

Tensor token_logps_backward(const OptionalTensor& grad_logps, const OptionalTensor& grad_entropy,
                            const Tensor& logits_in, const Tensor& labels,
                            const OptionalTensor& entropy, const Tensor& stats,
                            int64_t ignore_index, double temperature) {
  const Tensor logits = with_dense_rows(logits_in);
  Tensor out = empty_as(logits, sizes_of(logits), dtype_of(logits));
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
