// CPU kernels on rows of logits. Plain memory, no torch, no threads: a caller splits the rows.
//
// A row is z[0..V), scored at its label y. With an anchor m and s = sum_v exp(z_v - m):
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
// Rows arrive in segments (a slice of a row in memory, or one GEMM tile's columns), each swept
// once. The anchor is what the caller set stats.max to, which must be a logit of the row: the
// label's is a good guess, it usually is the largest or near. Without a guess the anchor is the
// largest of the first values. It moves up to the largest logit so far when that lies more than 2
// nats above; what was summed before is rescaled. settle() (row_stats.h) brings the finished sums
// to the row's maximum in fp64. Terms are formed in the compute type, summed eight by eight in it
// (the metrics' sixteen by sixteen) and then in fp64, in the same order whatever is asked for:
// asking for a metric or a gradient changes no bit of logp.
#pragma once

#include <stdint.h>

#include "core/logit_row.h"
#include "core/numeric.h"

namespace fusedpo {

// Widest segment a kernel takes.
constexpr int64_t kMaxSegment = 4096;

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
  // writes exp(z - m) (1 - tanh^2), 0 at the label, in the type of x; e may be x.
  double (*accumulate)(DType compute, const Segment& segment, const LogitTransform& transform,
                       unsigned metrics, const double* exact_target, RowStats* stats, void* e);

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
