// linear_token_logps on CPU, forward. Log-probs, metrics and d logp / d hidden in one walk over the
// vocabulary; a tile of logits lives from its GEMM to the end of its loop body.
//
// With m_t the anchor after tile t and e = exp(x - m_t), 0 at the label:
//
//   for each tile t: e = X W_t^T -> exp;  G = exp(m_{t-1} - m_t) G + e W_t        (2 GEMMs)
//   d logp / d x_row = k (1 - p_y) W[y] - (k / s) G                k = logit_scale / temperature
//
// which is the unit gradient: it does not depend on the loss, and backward only scales its rows.
#include <cmath>

#include "core/finish_row.h"
#include "cpu/row_stats.h"
#include "ops/large.h"
#include "ops/linear_problem.h"
#include "ops/row_outputs.h"

namespace fusedpo {
namespace {

// G of one factor (W or B), then the unit gradient itself.
class UnitGradient {
 public:
  UnitGradient(const LinearProblem& p, int64_t rows_in_all, int64_t cols)
      : total(zeros_large(p.x, {rows_in_all, cols}, p.result)),
        p_(p),
        cols_(cols),
        product_(p.product_scratch(cols)) {}

  // G += e [rows, tile] @ factor [tile, C] for rows [begin, begin + rows).
  void add(const Tensor& e, const Tensor& factor, int64_t begin, int64_t rows) {
    p_.add_product(narrowed(total, begin, rows), product_, e, factor);
  }

  void scale_row(int64_t i, double factor) {
    void* row = row_data(i);
    row_kernels().scale(p_.result, factor, row, row, p_.result, cols_);
  }

  // total[i] = a total[i] + b label_row.
  void finish_row(int64_t i, double a, double b, const void* label_row) {
    row_kernels().scale_add(p_.result, a, row_data(i), b, label_row, p_.result, cols_);
  }

  Tensor total;  // [rows in all, C]; rows past the scored ones stay 0

 private:
  void* row_data(int64_t i) {
    return static_cast<char*>(total.data_ptr()) + i * cols_ * size_of(p_.result);
  }

  const LinearProblem& p_;
  int64_t cols_;
  Tensor product_;
};

// The label's logit in fp32, where the tile of logits was rounded to bf16.
double exact_logit(const LinearProblem& p, const VocabTile& tile, int64_t i, int64_t label) {
  const auto product = [&](const Tensor& rows, const Tensor& weights) {
    const char* a = static_cast<const char*>(rows.const_data_ptr());
    const char* b = static_cast<const char*>(weights.const_data_ptr());
    const int64_t cols = rows.size(1), item = size_of(p.gemm);
    return row_kernels().dot(p.result, a + i * rows.stride(0) * item, p.gemm,
                             b + label * weights.stride(0) * item, p.gemm, cols);
  };
  return product(p.x, tile.weight) + (p.u.defined() ? product(p.u, tile.lora_weight) : 0.0);
}

// [logps, entropy, log_sum_sq_probs, mean_logits, is_top1, stats, unit_grad, lora_unit_grad, kept,
// anchors, count]
using Result =
    std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, Tensor,
               OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, Tensor>;

Result linear_token_logps(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& lora_hidden, const OptionalTensor& lora_weight,
                          const Tensor& labels, int64_t ignore_index, double temperature,
                          double softcap, double logit_scale, int64_t metric_bits,
                          ScalarType compute_dtype, int64_t vocab_tile, int64_t want_grads,
                          int64_t keep_rows_at_most) {
  LinearProblem p({hidden,
                   weight,
                   bias,
                   lora_hidden,
                   lora_weight,
                   labels,
                   ignore_index,
                   {logit_scale, softcap, temperature},
                   dtype_of(compute_dtype),
                   vocab_tile});
  const unsigned metrics = static_cast<unsigned>(metric_bits);
  const RowKernels& kernels = row_kernels();
  const int64_t rows_in_all = labels.numel();
  const int64_t keep_rows = std::min(keep_rows_at_most, rows_in_all);
  const int64_t stored = std::min(keep_rows, p.n);
  const bool exact_targets = p.gemm == DType::bf16;

  RowOutputs out(hidden, labels, p.result, metrics);
  Tensor stats = zeros_as(hidden, {rows_in_all, 4}, p.result);
  std::optional<UnitGradient> unit, lora_unit;
  if (want_grads & kHidden) unit.emplace(p, rows_in_all, hidden.size(hidden.dim() - 1));
  if ((want_grads & kLoraHidden) && lora_weight)
    lora_unit.emplace(p, rows_in_all, lora_weight->size(1));
  OptionalTensor kept, anchors;
  if (keep_rows_at_most > 0) {
    kept = empty_large(hidden, {keep_rows, p.vocab}, p.compute);
    anchors = zeros_as(hidden, {keep_rows, p.tiles}, p.result);
  }
  char* kept_data = kept ? static_cast<char*>(kept->data_ptr()) : nullptr;
  void* anchor_data = anchors ? anchors->data_ptr() : nullptr;

  const Tensor scratch = empty_as(hidden, {p.block * p.tile_width}, p.gemm);
  std::vector<RowStats> row_stats(static_cast<size_t>(p.n));
  for (int64_t tile = 0; tile < p.tiles && p.n > 0; ++tile) {
    const VocabTile operands = p.operands(tile);
    for (int64_t begin = 0; begin < p.n; begin += p.block) {
      const int64_t rows = std::min(p.block, p.n - begin);
      const Tensor z = p.logits(operands, begin, rows, scratch);
      const Rows z_rows(z);
      torch::stable::parallel_for(0, rows, row_grain(operands.n), [&](int64_t a, int64_t b) {
        for (int64_t r = a; r < b; ++r) {
          const int64_t i = begin + r,
                        label = p.kept.label[static_cast<size_t>(i)] - operands.begin;
          const bool keeps = i < stored, has_label = label >= 0 && label < operands.n;
          double exact = 0.0;
          if (exact_targets && has_label) exact = exact_logit(p, operands, i, label);
          void* e = unit || lora_unit || keeps ? z_rows.row(r) : nullptr;
          RowStats& s = row_stats[static_cast<size_t>(i)];
          const Segment segment{z_rows.row(r), p.gemm, operands.bias_data(), operands.n, label};
          const double factor =
              kernels.accumulate(p.result, segment, p.transform, metrics,
                                 exact_targets && has_label ? &exact : nullptr, &s, e);
          if (unit && factor != 1.0 && tile > 0) unit->scale_row(i, factor);
          if (lora_unit && factor != 1.0 && tile > 0) lora_unit->scale_row(i, factor);
          if (keeps) {
            char* to = kept_data + (stored * operands.begin + i * operands.n) * size_of(p.compute);
            kernels.convert(p.gemm, e, p.compute, p.compute, to, operands.n);
            set_value(anchor_data, p.result, i * p.tiles + tile, s.max);
          }
        }
      });
      if (unit) unit->add(z, operands.weight, begin, rows);
      if (lora_unit) lora_unit->add(z, operands.lora_weight, begin, rows);
    }
  }

  const double k = logit_scale / temperature;
  void* stats_data = stats.data_ptr();
  torch::stable::parallel_for(0, p.n, 1, [&](int64_t a, int64_t b) {
    std::vector<double> label_row;  // room for a row of W or B in fp32 or fp64
    for (int64_t i = a; i < b; ++i) {
      RowStats& s = row_stats[static_cast<size_t>(i)];
      const double anchor = s.max;  // what G is in units of
      settle(&s);
      const RowResult r = finish_row(s, p.vocab);
      out.set(p.kept.position[static_cast<size_t>(i)], r);
      const double values[] = {r.max, r.log_sum, r.rest_share, s.target_slope};
      for (int64_t j = 0; j < 4; ++j) set_value(stats_data, p.result, 4 * i + j, values[j]);
      const double of_total = -k * std::exp((anchor - r.max) - r.log_sum),
                   of_label = k * r.rest_share * s.target_slope;
      const int64_t label = p.kept.label[static_cast<size_t>(i)];
      if (unit) {
        label_row.resize(static_cast<size_t>(weight.size(1)));
        p.weight_row(label, label_row.data());
        unit->finish_row(i, of_total, of_label, label_row.data());
      }
      if (lora_unit) {
        label_row.resize(static_cast<size_t>(lora_weight->size(1)));
        p.lora_weight_row(label, label_row.data());
        lora_unit->finish_row(i, of_total, of_label, label_row.data());
      }
    }
  });
  const Tensor count = empty_cpu({1}, aoti_torch_dtype_int64());
  *count.mutable_data_ptr<int64_t>() = p.n;
  return {out.logps,
          out.entropy,
          out.log_sum_sq_probs,
          out.mean_logits,
          out.is_top1,
          stats,
          unit ? OptionalTensor(unit->total) : std::nullopt,
          lora_unit ? OptionalTensor(lora_unit->total) : std::nullopt,
          kept,
          anchors,
          count};
}

Tensor linear_token_logps_backward_hidden(const Tensor& grad_logps_in, const Tensor& unit_grad,
                                          const Tensor& labels, int64_t ignore_index,
                                          ScalarType dtype) {
  const DType result = dtype_of(unit_grad), type = dtype_of(dtype);
  const int64_t cols = unit_grad.size(1);
  check_saved(unit_grad, labels.numel(), cols, result, "unit_grad");
  const Tensor grad_logps = *dense_gradient(grad_logps_in, labels, result);
  std::vector<int64_t> shape = sizes_of(labels);
  shape.push_back(cols);
  const Tensor out = zeros_large(unit_grad, shape, type);
  // Labels were checked in forward, so any positive number of classes will do.
  const KeptRows kept = kept_rows(labels, INT64_MAX, ignore_index);
  const char* from = static_cast<const char*>(unit_grad.const_data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  const void* c = grad_logps.const_data_ptr();
  const RowKernels& kernels = row_kernels();
  torch::stable::parallel_for(0, kept.count(), row_grain(cols), [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) {
      const int64_t t = kept.position[static_cast<size_t>(i)];
      kernels.scale(result, value_at(c, result, t), from + i * cols * size_of(result),
                    to + t * cols * size_of(type), type, cols);
    }
  });
  return out;
}

}  // namespace
}  // namespace fusedpo

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  m.impl("linear_token_logps", TORCH_BOX(&fusedpo::linear_token_logps));
  m.impl("linear_token_logps_backward_hidden",
         TORCH_BOX(&fusedpo::linear_token_logps_backward_hidden));
}
