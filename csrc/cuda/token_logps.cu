#include "cuda/token_logps.h"

#include "cuda/row_gradient.cuh"
#include "cuda/row_results.cuh"
#include "cuda/row_sums.cuh"

namespace fusedpo::cuda {
namespace {

// Small blocks, several on a multiprocessor: one row's end overlaps with another's beginning.
constexpr unsigned kThreads = 256, kBlocks = 4;

struct ForwardArgs {
  RowsView logits;
  const int64_t* labels;
  int64_t ignore_index;
  double temperature;
  RowOutputs out;
  void* stats;
};

template <typename R>
__device__ void store_row(const ForwardArgs& args, int64_t position, const RowResult& r) {
  store_result<R>(args.out, position, r);
  store_at<R>(args.stats, 3 * position, r.max);
  store_at<R>(args.stats, 3 * position + 1, r.log_sum);
  store_at<R>(args.stats, 3 * position + 2, r.rest_share);
}

// Grid: one block for each row, which it reads once.
template <typename T, bool kMetrics>
__global__ void __launch_bounds__(kThreads, kBlocks)
    score(const __grid_constant__ ForwardArgs args) {
  using R = Compute<T>;
  const int64_t position = blockIdx.x;
  const int64_t label = args.labels[position];
  if (label == args.ignore_index || label < 0 || label >= args.logits.cols) {
    const RowResult r = label == args.ignore_index ? unscored() : invalid();
    if (threadIdx.x == 0) store_row<R>(args, position, r);
    return;
  }
  const T* data = static_cast<const T*>(args.logits.data) + args.logits.layout.offset(position);
  const LogitTransform f{1.0, 0.0, args.temperature};
  const PlainRow<T> row(data, f, nullptr);
  __shared__ RowScore s;
  score_row<PlainRow<T>, kMetrics, true>(
      row, static_cast<int>(args.logits.cols), static_cast<int>(label), [](double x) { return x; },
      &s);
  if (threadIdx.x == 0) store_row<R>(args, position, s.result);
}

struct BackwardArgs {
  RowsView logits, out;
  const int64_t* labels;
  int64_t ignore_index;
  double temperature;
  const void *grad_logps, *grad_entropy, *entropy, *stats;
};

// Grid: one block for each row: one read and one write, or, where nothing comes from upstream, one
// write.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    differentiate(const __grid_constant__ BackwardArgs args) {
  using R = Compute<T>;
  const int64_t position = blockIdx.x;
  const int64_t label = args.labels[position];
  const int cols = static_cast<int>(args.logits.cols);
  T* const out = static_cast<T*>(args.out.data) + args.out.layout.offset(position);
  const double grad_logp = value_at<R>(args.grad_logps, position, 0.0);
  const double grad_entropy = value_at<R>(args.grad_entropy, position, 0.0);
  if (label == args.ignore_index || (grad_logp == 0.0 && grad_entropy == 0.0)) {
    write_zeros(out, cols);
    return;
  }
  __shared__ RowGradient g;
  if (threadIdx.x == 0) {
    g = {value_at<R>(args.stats, 3 * position, 0.0),
         value_at<R>(args.stats, 3 * position + 1, 0.0),
         value_at<R>(args.stats, 3 * position + 2, 0.0),
         grad_logp,
         grad_entropy,
         value_at<R>(args.entropy, position, 0.0)};
  }
  const T* data = static_cast<const T*>(args.logits.data) + args.logits.layout.offset(position);
  const LogitTransform f{1.0, 0.0, args.temperature};
  const PlainRow<T> row(data, f, nullptr);
  const bool valid = label >= 0 && label < cols;  // otherwise stats are NaN, and so is all of it
  write_gradient<PlainRow<T>, true>(row, cols, valid ? static_cast<int>(label) : 0, g, 1.0, 1.0,
                                    out);
}

}  // namespace

void token_logps(const RowsView& logits, const int64_t* labels, int64_t ignore_index,
                 double temperature, unsigned metrics, const RowOutputs& out, void* stats,
                 Stream stream) {
  if (logits.n == 0) return;
  const dim3 grid(static_cast<unsigned>(logits.n));
  const ForwardArgs args{logits, labels, ignore_index, temperature, out, stats};
  const auto run = [&](auto with_metrics, auto without) {
    launch((metrics & kSumMetrics) != 0 ? with_metrics : without, grid, dim3(kThreads), stream,
           args);
  };
  switch (logits.type) {
    case DType::f32:
      return run(score<float, true>, score<float, false>);
    case DType::bf16:
      return run(score<bf16, true>, score<bf16, false>);
    case DType::f16:
      return run(score<f16, true>, score<f16, false>);
    case DType::f64:  // rare: one kernel for both
      return run(score<double, true>, score<double, true>);
  }
}

void token_logps_backward(const RowsView& logits, const int64_t* labels, int64_t ignore_index,
                          double temperature, const void* grad_logps, const void* grad_entropy,
                          const void* entropy, const void* stats, const RowsView& out,
                          Stream stream) {
  if (logits.n == 0) return;
  const dim3 grid(static_cast<unsigned>(logits.n));
  const BackwardArgs args{logits,     out,          labels,  ignore_index, temperature,
                          grad_logps, grad_entropy, entropy, stats};
  const auto run = [&](auto kernel) { launch(kernel, grid, dim3(kThreads), stream, args); };
  switch (logits.type) {
    case DType::f32:
      return run(differentiate<float>);
    case DType::bf16:
      return run(differentiate<bf16>);
    case DType::f16:
      return run(differentiate<f16>);
    case DType::f64:
      return run(differentiate<double>);
  }
}

}  // namespace fusedpo::cuda
