// CPU kernels on rows of logits. Plain memory, no torch, no threads: a caller splits the rows.
//
// A row is z[0..V), scored at its label y. With m = max z and s = sum_v exp(z_v - m):
//
//   logp    = z_y - m - log s
//   entropy = log s - (1/s) sum_v exp(z_v - m) (z_v - m)
//   d logp    / d z_v = 1[v = y] - p_v                    p_v = exp(z_v - m) / s
//   d entropy / d z_v = -p_v (log p_v + entropy)
//
// The label's own term is kept out of every sum. So 1 - p_y = rest / s and, where y is the maximum,
// logp = -log1p(rest) are formed without cancellation, and a confident token keeps its relative
// precision in the value and in the gradient.
//
// Rows arrive in segments (a slice of a row in memory, or one GEMM tile's columns). Each segment is
// anchored at the largest logit so far; what was summed before is rescaled when the anchor moves.
// Terms are formed in the compute type and summed in fp64. One code path serves every combination of
// outputs, so asking for a metric or a gradient changes no bit of logp.
#pragma once

#include <stdint.h>

#include "core/numeric.h"

namespace fusedpo {

// Widest segment a kernel takes.
constexpr int64_t kMaxSegment = 4096;

// Which metrics a row needs besides logp; bits of the operators' `metrics` argument.
enum Metric : unsigned { kEntropy = 1, kLogSumSqProbs = 2, kMeanLogits = 4, kIsTop1 = 8 };

// z = softcap * tanh(scale * (x + bias) / softcap) / temperature; softcap 0 means none.
struct LogitTransform {
  double scale = 1.0;
  double softcap = 0.0;
  double temperature = 1.0;
};

// What is known of a row after some of its segments. Start from RowStats{}.
struct RowStats {
  double max = -__builtin_inf();  // the anchor m
  double rest = 0.0;              // sum_{v != y} exp(z_v - m)
  double rest_z = 0.0;            // sum_{v != y} exp(z_v - m) (z_v - m)
  double rest_sq = 0.0;           // sum_{v != y} exp(z_v - m)^2
  double sum = 0.0;               // sum_v z_v
  double target = 0.0;            // z_y
  double target_slope =
      1.0;                // d z_y / d x_y over scale / temperature: 1 - tanh^2, 1 without softcap
  int64_t count = 0;      // values seen
  double compared = 0.0;  // z_y as the segment had it: what is_top1 compares
  bool seen = false;      // the label's segment was added
  bool beaten = false;    // an earlier z_v >= z_y or a later one > z_y
};

// A finished row, in the compute type's precision once stored.
struct RowResult {
  double logp, entropy, log_sum_sq_probs, mean_logits;
  bool is_top1;
  double max, log_sum;  // m and log s
  double rest_share;    // 1 - p_y
};

RowResult finish_row(const RowStats& stats, int64_t vocab);

// Coefficients of one row's gradient: d loss / d z_v = logp * d logp / d z_v + entropy * d entropy
// / d z_v.
struct RowGradient {
  double max, log_sum;
  double rest_share;    // 1 - p_y
  double grad_logp;     // d loss / d logp
  double grad_entropy;  // d loss / d entropy; 0 when nobody asked
  double entropy;       // used with grad_entropy only
};

// One row's columns [begin, begin + n) of the logits before the transform. In every function below
// `compute` is f32 or f64, the type of the arithmetic.
struct Segment {
  const void* x;  // [n] of x_type
  DType x_type;
  const void* bias;  // [n] of the compute type, or null
  int64_t n;         // at most kMaxSegment
  int64_t label;     // y - begin; outside [0, n) when the label is elsewhere
};

struct RowKernels {
  const char* name;

  // Adds one segment to `stats` and returns the factor exp(m_before - m_now) by which everything
  // the caller accumulated in units of exp(-m) must be multiplied. `exact_target`, when not null,
  // is x_y in higher precision and replaces the segment's value at the label. With `e` not null
  // writes exp(z - m) (1 - tanh^2), 0 at the label, as e_type; e may be x.
  double (*accumulate)(DType compute, const Segment& segment, const LogitTransform& transform,
                       unsigned metrics, const double* exact_target, RowStats* stats, void* e,
                       DType e_type);

  // Writes d loss / d x for one segment as out_type; out may be x.
  void (*gradient)(DType compute, const Segment& segment, const LogitTransform& transform,
                   const RowGradient& row, void* out, DType out_type);

  // out[i] = x[i] rounded to `through` and stored as `to`. fp64 goes to fp64 only.
  void (*convert)(DType from, const void* x, DType through, DType to, void* out, int64_t n);

  // y[i] = a y[i] + b x[i], y of the compute type; a == 0 overwrites y.
  void (*scale_add)(DType compute, double a, void* y, double b, const void* x, DType x_type,
                    int64_t n);

  // out[i] = a x[i], x of the compute type.
  void (*scale)(DType compute, double a, const void* x, void* out, DType out_type, int64_t n);

  // sum_i a[i] b[i], in the compute type's products and fp64's sums.
  double (*dot)(DType compute, const void* a, DType a_type, const void* b, DType b_type, int64_t n);
};

// The fastest kernels this processor can run. FUSEDPO_CPU_ISA in the environment (generic, avx2,
// avx512) lowers the choice, for tests and bug reports; throws std::runtime_error when it names
// anything else.
const RowKernels& row_kernels();

// The named kernels, or null when they were not built or cannot run here.
const RowKernels* row_kernels(const char* name);

}  // namespace fusedpo
