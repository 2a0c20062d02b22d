#include "cuda/linear_logps.h"

#include "cuda/row_gradient.cuh"
#include "cuda/row_results.cuh"
#include "cuda/row_sums.cuh"

namespace fusedpo::cuda {
namespace {

constexpr unsigned kMaxThreads = 1024;

// The larger a row, the fewer are in flight: what a block reads twice should be in the L2 cache
// the second time. By the size alone, because the partition of a row decides the bits of its sums.
unsigned threads_for(const LogitRows& rows, int64_t item) {
  const int64_t bytes = rows.vocab * item;
  return bytes >= (192 << 10) ? 1024u : bytes >= (96 << 10) ? 512u : 256u;
}

struct ScoreArgs {
  LogitRows rows;
  RowOutputs out;
  void* stats;
  bool write_unit;
  double unit_scale;
};

template <typename R>
__device__ void store_stats(void* stats, int64_t i, const RowResult& r, double relative_slope) {
  store_at<R>(stats, 4 * i, r.max);
  store_at<R>(stats, 4 * i + 1, r.log_sum);
  store_at<R>(stats, 4 * i + 2, r.rest_share);
  store_at<R>(stats, 4 * i + 3, relative_slope);
}

// Grid: one block for each row, which it reads once: 2 bytes a value in 16-bit types. With
// write_unit it reads the row again, from its end, and writes it: 4 bytes a value from and to
// memory where the second read hits the L2 cache (132 rows of 256 KiB are in flight on an H200, and
// 50 MB fit), 6 where it misses.
template <typename Row, bool kMetrics>
__global__ void __launch_bounds__(kMaxThreads) score(const __grid_constant__ ScoreArgs args) {
  using T = typename Row::Value;
  using R = Compute<T>;
  const LogitRows& rows = args.rows;
  const int64_t i = blockIdx.x, position = rows.rows == nullptr ? i : rows.rows[i];
  const int cols = static_cast<int>(rows.vocab);
  T* const data = static_cast<T*>(rows.x) + i * rows.ld;
  const int64_t label = position < 0 ? rows.ignore_index : rows.labels[position];
  if (label == rows.ignore_index) {
    if (threadIdx.x == 0) {
      if (position >= 0) store_result<R>(args.out, position, unscored());
      store_stats<R>(args.stats, i, unscored(), 0.0);
    }
    if (args.write_unit) write_zeros(data, cols);
    return;
  }

  const bool valid = label >= 0 && label < cols;
  const int y = valid ? static_cast<int>(label) : 0;
  const Row row(data, rows.transform, rows.bias);
  __shared__ RowScore s;
  score_row<Row, kMetrics, false>(
      row, cols, y, [&](double x) { return value_at<R>(rows.exact_targets, i, x); }, &s);
  __shared__ RowGradient g;
  double relative_slope = 0.0;
  if (threadIdx.x == 0) {
    if (!valid) s.result = invalid();
    const RowResult& r = s.result;
    store_result<R>(args.out, position, r);
    relative_slope = s.relative_slope;
    store_stats<R>(args.stats, i, r, relative_slope);
    g = {r.max, r.log_sum, r.rest_share, 1.0, 0.0, 0.0};
  }
  if (args.write_unit) {
    write_gradient<Row, false>(row, cols, y, g, relative_slope, args.unit_scale, data);
  }
}

struct GradientArgs {
  LogitRows rows;
  const void *grad_logps, *grad_entropy, *entropy, *stats, *alpha;
};

// Grid: one block for each row: one read and one write, or, where nothing comes from upstream, one
// write.
template <typename Row>
__global__ void __launch_bounds__(kMaxThreads)
    differentiate(const __grid_constant__ GradientArgs args) {
  using T = typename Row::Value;
  using R = Compute<T>;
  const LogitRows& rows = args.rows;
  const int64_t i = blockIdx.x, position = rows.rows == nullptr ? i : rows.rows[i];
  const int cols = static_cast<int>(rows.vocab);
  T* const data = static_cast<T*>(rows.x) + i * rows.ld;
  const int64_t label = position < 0 ? rows.ignore_index : rows.labels[position];
  double grad_logp = 0.0, grad_entropy = 0.0;
  if (position >= 0) {
    grad_logp = value_at<R>(args.grad_logps, position, 0.0);
    grad_entropy = value_at<R>(args.grad_entropy, position, 0.0);
  }
  if (label == rows.ignore_index || (grad_logp == 0.0 && grad_entropy == 0.0)) {
    write_zeros(data, cols);
    return;
  }
  __shared__ RowGradient g;
  double relative_slope = 0.0;
  if (threadIdx.x == 0) {
    g = {value_at<R>(args.stats, 4 * i, 0.0),
         value_at<R>(args.stats, 4 * i + 1, 0.0),
         value_at<R>(args.stats, 4 * i + 2, 0.0),
         grad_logp,
         grad_entropy,
         value_at<R>(args.entropy, position, 0.0)};
    relative_slope = value_at<R>(args.stats, 4 * i + 3, 0.0);
  }
  const bool valid = label >= 0 && label < cols;  // otherwise stats are NaN, and so is all of it
  const Row row(data, rows.transform, rows.bias);
  write_gradient<Row, true>(row, cols, valid ? static_cast<int>(label) : 0, g, relative_slope,
                            value_at<R>(args.alpha, 0, 1.0), data);
}

struct ProductArgs {
  const void *a, *w;
  DType compute, w_type;
  int64_t w_row_stride, w_col_stride, cols;
  LogitRows rows;
  bool add;
  void* exact;
};

constexpr unsigned kProductThreads = 128;

__device__ inline double load_rounded(const double* w, int64_t at, const double*) { return w[at]; }

// w[at] rounded to the type of the other factor.
template <typename W, typename T>
__device__ inline float load_rounded(const W* w, int64_t at, const T*) {
  T rounded;
  from_float(to_float(w[at]), &rounded);
  return to_float(rounded);
}

// Grid: one block for each row of a: one read of it and of its label's row of w.
template <typename T, typename W>
__global__ void __launch_bounds__(kProductThreads)
    multiply(const __grid_constant__ ProductArgs args) {
  using R = Compute<T>;
  const LogitRows& rows = args.rows;
  const int64_t i = blockIdx.x, position = rows.rows == nullptr ? i : rows.rows[i];
  const int64_t label = position < 0 ? rows.ignore_index : rows.labels[position];
  if (label == rows.ignore_index || label < 0 || label >= rows.vocab) {
    if (threadIdx.x == 0 && !args.add) static_cast<R*>(args.exact)[i] = 0;
    return;
  }
  const T* a = static_cast<const T*>(args.a) + i * args.cols;
  const W* w = static_cast<const W*>(args.w) + label * args.w_row_stride;
  R part = 0;  // tens of products
#pragma unroll 8
  for (int64_t h = threadIdx.x; h < args.cols; h += kProductThreads) {
    part += static_cast<R>(to_float(a[h])) * load_rounded(w, h * args.w_col_stride, a);
  }
  const double product = block_sum(part);
  if (threadIdx.x == 0) {
    R* const out = static_cast<R*>(args.exact) + i;
    *out = static_cast<R>(product + (args.add ? static_cast<double>(*out) : 0.0));
  }
}

template <typename T>
void multiply_by(const ProductArgs& args, Stream stream) {
  const dim3 grid(static_cast<unsigned>(args.rows.n)), block(kProductThreads);
  switch (args.w_type) {
    case DType::bf16:
      return launch(multiply<T, bf16>, grid, block, stream, args);
    case DType::f16:
      return launch(multiply<T, f16>, grid, block, stream, args);
    default:
      return launch(multiply<T, float>, grid, block, stream, args);
  }
}

template <typename T>
void score_as(const ScoreArgs& args, bool metrics, Stream stream) {
  const dim3 grid(static_cast<unsigned>(args.rows.n)), block(threads_for(args.rows, sizeof(T)));
  if (!is_plain(args.rows.transform, args.rows.bias)) {  // rare: one kernel for both
    launch(score<TransformedRow<T>, true>, grid, block, stream, args);
  } else if (metrics || sizeof(T) == 8) {
    launch(score<PlainRow<T>, true>, grid, block, stream, args);
  } else if constexpr (sizeof(T) != 8) {
    launch(score<PlainRow<T>, false>, grid, block, stream, args);
  }
}

template <typename T>
void differentiate_as(const GradientArgs& args, Stream stream) {
  const dim3 grid(static_cast<unsigned>(args.rows.n)), block(threads_for(args.rows, sizeof(T)));
  if (is_plain(args.rows.transform, args.rows.bias)) {
    launch(differentiate<PlainRow<T>>, grid, block, stream, args);
  } else {
    launch(differentiate<TransformedRow<T>>, grid, block, stream, args);
  }
}

}  // namespace

void label_products(const void* a, DType compute, const void* w, DType w_type, int64_t w_row_stride,
                    int64_t w_col_stride, int64_t cols, const LogitRows& rows, bool add,
                    void* exact, Stream stream) {
  if (rows.n == 0) return;
  const ProductArgs args{a, w, compute, w_type, w_row_stride, w_col_stride, cols, rows, add, exact};
  switch (compute) {
    case DType::f32:
      return multiply_by<float>(args, stream);
    case DType::bf16:
      return multiply_by<bf16>(args, stream);
    case DType::f16:
      return multiply_by<f16>(args, stream);
    case DType::f64:
      return launch(multiply<double, double>, dim3(static_cast<unsigned>(rows.n)),
                    dim3(kProductThreads), stream, args);
  }
}

void score_rows(const LogitRows& rows, unsigned metrics, bool write_unit, const RowOutputs& out,
                void* stats, Stream stream) {
  if (rows.n == 0) return;
  const ScoreArgs args{rows, out, stats, write_unit, unit_scale(rows.type, rows.transform)};
  const bool sums = (metrics & kSumMetrics) != 0;
  switch (rows.type) {
    case DType::f32:
      return score_as<float>(args, sums, stream);
    case DType::bf16:
      return score_as<bf16>(args, sums, stream);
    case DType::f16:
      return score_as<f16>(args, sums, stream);
    case DType::f64:
      return score_as<double>(args, sums, stream);
  }
}

void gradient_rows(const LogitRows& rows, const void* grad_logps, const void* grad_entropy,
                   const void* entropy, const void* stats, const void* alpha, Stream stream) {
  if (rows.n == 0) return;
  const GradientArgs args{rows, grad_logps, grad_entropy, entropy, stats, alpha};
  switch (rows.type) {
    case DType::f32:
      return differentiate_as<float>(args, stream);
    case DType::bf16:
      return differentiate_as<bf16>(args, stream);
    case DType::f16:
      return differentiate_as<f16>(args, stream);
    case DType::f64:
      return differentiate_as<double>(args, stream);
  }
}

}  // namespace fusedpo::cuda
