// Where a row's results go.
#pragma once

#include "core/logit_row.h"
#include "cuda/device.cuh"
#include "cuda/token_logps.h"

namespace fusedpo::cuda {

constexpr unsigned kSumMetrics = kEntropy | kLogSumSqProbs | kMeanLogits;  // those that cost a sum

template <typename R>
__device__ inline void store_at(void* out, int64_t at, double value) {
  if (out != nullptr) static_cast<R*>(out)[at] = static_cast<R>(value);
}

template <typename R>
__device__ inline double value_at(const void* from, int64_t at, double absent) {
  return from == nullptr ? absent : static_cast<double>(static_cast<const R*>(from)[at]);
}

template <typename R>
__device__ inline void store_result(const RowOutputs& out, int64_t position, const RowResult& r) {
  store_at<R>(out.logps, position, r.logp);
  store_at<R>(out.entropy, position, r.entropy);
  store_at<R>(out.log_sum_sq_probs, position, r.log_sum_sq_probs);
  store_at<R>(out.mean_logits, position, r.mean_logits);
  if (out.is_top1 != nullptr) out.is_top1[position] = r.is_top1;
}

// Of a row that is not scored, or whose label is no column.
__device__ inline RowResult unscored() { return {0, 0, 0, 0, false, 0, 0, 0}; }
__device__ inline RowResult invalid() {
  const double nan = static_cast<double>(NAN);
  return {nan, nan, nan, nan, false, nan, nan, nan};
}

}  // namespace fusedpo::cuda
