// The per-row results both log-prob operators return: allocation and writing.
#pragma once

#include "cpu/row_kernels.h"
#include "ops/stable.h"

namespace fusedpo {

// Shaped like labels, zero where nothing is written; a metric that was not asked for is absent.
struct RowOutputs {
  Tensor logps;
  OptionalTensor entropy, log_sum_sq_probs, mean_logits, is_top1;

  RowOutputs(const Tensor& like, const Tensor& labels, DType compute_type, unsigned metrics)
      : logps(zeros_as(like, sizes_of(labels), compute_type)), type(compute_type) {
    const std::vector<int64_t> shape = sizes_of(labels);
    if (metrics & kEntropy) entropy = zeros_as(like, shape, type);
    if (metrics & kLogSumSqProbs) log_sum_sq_probs = zeros_as(like, shape, type);
    if (metrics & kMeanLogits) mean_logits = zeros_as(like, shape, type);
    if (metrics & kIsTop1) is_top1 = torch::stable::new_zeros(like, shape, ScalarType::Bool);
  }

  // Rows may be set from several threads, each row from one.
  void set(int64_t position, const RowResult& r) {
    set_value(logps.mutable_data_ptr(), type, position, r.logp);
    if (entropy) set_value(entropy->mutable_data_ptr(), type, position, r.entropy);
    if (log_sum_sq_probs) {
      set_value(log_sum_sq_probs->mutable_data_ptr(), type, position, r.log_sum_sq_probs);
    }
    if (mean_logits) set_value(mean_logits->mutable_data_ptr(), type, position, r.mean_logits);
    if (is_top1) static_cast<bool*>(is_top1->mutable_data_ptr())[position] = r.is_top1;
  }

 private:
  DType type;
};

}  // namespace fusedpo
