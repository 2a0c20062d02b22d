// The memory-bound steps of linear_token_logps between its GEMMs.
//
//   x = X W^T + U B^T  [n, V]       from a GEMM, in the compute type
//   z = transform(x + bias)         logp_i = z_iy - logsumexp(z_i)
//   D_i = d logp_i / d x_i  [V]     = k (1[v = y] - p_v) (1 - tanh^2),  k = scale / temperature
//
// D does not depend on the loss. It takes x's place in memory in the compute type, and then
// d logp / d X = D W and d loss / d W = D^T diag(c) X are plain GEMMs. Entries are stored times
// unit_scale: fp16 would lose the small ones.
#pragma once

#include <cmath>

#include "core/logit_row.h"
#include "cuda/token_logps.h"

namespace fusedpo::cuda {

// What D is multiplied by when stored: a power of two that brings its largest entries, of size k,
// to about 1024 in fp16.
inline double unit_scale(DType compute, const LogitTransform& f) {
  if (compute != DType::f16) return 1.0;
  const double k = std::fabs(f.scale / f.temperature);
  if (!(k > 1.0) || !std::isfinite(k)) return 1024.0;
  return std::ldexp(1024.0, -static_cast<int>(std::ceil(std::log2(k))));
}

// Scored rows of x and their labels.
struct LogitRows {
  void* x = nullptr;  // [n, vocab] of the compute type, row stride ld
  DType type = DType::f32;
  int64_t n = 0, ld = 0, vocab = 0;
  const int64_t* rows = nullptr;    // [n]: the position of row i, -1: none; null: i itself
  const int64_t* labels = nullptr;  // by position
  int64_t ignore_index = -100;      // such a row is written as zeros
  const void* bias = nullptr;       // [vocab] of the result type, already rounded; or null
  LogitTransform transform;
  // [n] of the result type or null: the label's x before bias in higher precision. It replaces the
  // rounded one, in the label's logit and in its term of the sum.
  const void* exact_targets = nullptr;
};

// exact[i] = sum_h a[i, h] w[label_i, h] with w rounded to the compute type, summed in fp32 (fp64);
// added to exact where `add`. a is dense [n, cols] of the compute type, w [vocab, cols] with any
// strides.
void label_products(const void* a, DType compute, const void* w, DType w_type, int64_t w_row_stride,
                    int64_t w_col_stride, int64_t cols, const LogitRows& rows, bool add,
                    void* exact, Stream stream);

// Row results to their positions, stats [n, 4] by scored row (max z, log sum, 1 - p_label,
// 1 - tanh^2 at the label), and, where write_unit, unit_scale * D over x. One read, and one write
// where write_unit; asking for a metric or a gradient changes no bit of logps.
void score_rows(const LogitRows& rows, unsigned metrics, bool write_unit, const RowOutputs& out,
                void* stats, Stream stream);

// x is replaced by alpha * d loss / d x from stats and the upstream gradients by position (either
// null), entropy by position. alpha: one value of the result type on the device, null for 1.
void gradient_rows(const LogitRows& rows, const void* grad_logps, const void* grad_entropy,
                   const void* entropy, const void* stats, const void* alpha, Stream stream);

}  // namespace fusedpo::cuda
