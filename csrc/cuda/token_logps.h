// Log-probs and metrics from logits [..., V]: one read forward; backward reads once and writes
// once.
//
// One block owns a row. Every thread keeps running sums anchored at its own largest logit; they are
// joined in a fixed order, so results are the same in every run. The mathematics, and why the
// label's own term is kept out of every sum, is in core/finish_row.h and cpu/row_kernels.h.
#pragma once

#include "core/logit_row.h"
#include "cuda/rows.h"

namespace fusedpo::cuda {

// Where row results go: [positions] of the result type (fp32; fp64 for fp64 logits), null when not
// wanted. A position that is not scored gets 0; a label outside [0, vocab) gives NaN (false).
struct RowOutputs {
  void *logps = nullptr, *entropy = nullptr, *log_sum_sq_probs = nullptr, *mean_logits = nullptr;
  bool* is_top1 = nullptr;
};

// stats [positions, 3] of the result type: max z, log sum exp(z - max), 1 - p_label; by position.
void token_logps(const RowsView& logits, const int64_t* labels, int64_t ignore_index,
                 double temperature, unsigned metrics, const RowOutputs& out, void* stats,
                 Stream stream);

// out[t] = d loss / d logits[t], 0 where not scored; out may be logits. grad_logps, grad_entropy
// and entropy [positions] are of the result type; either gradient may be null.
void token_logps_backward(const RowsView& logits, const int64_t* labels, int64_t ignore_index,
                          double temperature, const void* grad_logps, const void* grad_entropy,
                          const void* entropy, const void* stats, const RowsView& out,
                          Stream stream);

}  // namespace fusedpo::cuda
