#include "cuda/loss_cuda.h"

#include "cuda/reduce.cuh"

namespace fusedpo::cuda {
namespace {

// One block: B is small, and what the whole batch has to know of itself is a barrier away.
constexpr unsigned kThreads = 256;

template <typename Body>
__device__ inline void for_each(int64_t count, Body body) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) body(i);
}

// order[k] = the index of the k-th smallest value. Every thread counts what comes before its own
// values: B^2 comparisons in all, and no exchange.
__device__ void sort_order(const double* values, int64_t count, int64_t* order) {
  for_each(count, [&](int64_t i) {
    const double value = values[i];
    int64_t rank = 0;
    for (int64_t j = 0; j < count; ++j) rank += sorts_before(values[j], j, value, i) ? 1 : 0;
    order[rank] = i;
  });
}

template <typename T>
struct PairArgs {
  LossList list;
  PairOptions options;
  PairBatch<T> batch;
  double scale;
  unsigned needs;
  PairResults<T> out;
  double* scratch;  // up, down and the sums of sorting losses by position, [B] each
};

template <typename T>
__global__ void __launch_bounds__(kThreads) pairs(const __grid_constant__ PairArgs<T> args) {
  const PairBatch<T>& batch = args.batch;
  const int64_t n = batch.count;
  const ListTraits traits(args.list.items, args.list.count);
  double *const up = args.scratch, *const down = up + n, *const sums = down + n;
  if (traits.sorted != 0) {
    T* slopes = sorted_slopes(args.needs, args.out.gradients, n);
    int64_t* order = args.out.order;
    for_each(n, [&](int64_t i) { sums[i] = 0.0; });
    for (const SortedLoss one : {kSortedAot, kSortedAotUnpaired}) {
      if ((traits.sorted & one) == 0) continue;
      for_each(n, [&](int64_t i) { sorted_sides(one, batch, i, &up[i], &down[i]); });
      __syncthreads();
      sort_order(up, n, order);
      sort_order(down, n, order + n);
      __syncthreads();
      const double weight = traits.sorted_weight[one == kSortedAot ? 0 : 1];
      for_each(n, [&](int64_t i) {
        const Term term = sorted_loss(up[order[i]] - down[order[n + i]], args.options);
        sums[i] += weight * term.value;
        if (slopes != nullptr) slopes[i] = static_cast<T>(weight * term.slope);
      });
      __syncthreads();  // up and down may be filled again
      order += 2 * n;
      if (slopes != nullptr) slopes += n;
    }
  }

  const InputRows<T> gradients(args.needs, args.out.gradients, n);
  double share = 0.0;
  for_each(n, [&](int64_t i) {
    share += evaluate_pair(args.list.items, args.list.count, traits, args.options, batch,
                           traits.sorted == 0 ? 0.0 : sums[i], gradients, i, args.out);
  });
  const double total = block_sum(share);
  if (threadIdx.x == 0) *args.out.total = static_cast<T>(args.scale * total);
}

template <typename T>
struct UnpairedArgs {
  UnpairedLoss loss;
  UnpairedOptions options;
  int64_t count;
  const T *logps, *ref_logps;
  const bool* desirable;
  const T* shift_value;
  double scale;
  unsigned needs;
  T *total, *losses, *rewards, *gradients;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    completions(const __grid_constant__ UnpairedArgs<T> args) {
  UnpairedOptions options = args.options;
  if (args.shift_value != nullptr) options = with_shift(options, *args.shift_value);
  const InputRows<T> gradients(args.needs, args.gradients, args.count);
  double share = 0.0;
  for_each(args.count, [&](int64_t i) {
    share += evaluate_completion(args.loss, options, args.logps, args.ref_logps, args.desirable,
                                 gradients, i, args.losses, args.rewards);
  });
  const double total = block_sum(share);
  if (threadIdx.x == 0) *args.total = static_cast<T>(args.scale * total);
}

template <typename T>
struct BackwardArgs {
  GradientScale<T> in;
  const T* grad_loss;
  T* out[kInputs];
};

template <typename T>
__global__ void __launch_bounds__(kThreads) scale(const __grid_constant__ BackwardArgs<T> args) {
  const GradientScale<T>& in = args.in;
  const int64_t n = in.count;
  const double of_total =
      args.grad_loss == nullptr ? 0.0 : in.grad_total * static_cast<double>(*args.grad_loss);
  const auto value = [&](const T* slopes, int64_t i) {
    const double of_one = in.grad_losses == nullptr ? 0.0 : static_cast<double>(in.grad_losses[i]);
    return (of_total + of_one) * static_cast<double>(slopes[i]);
  };
  const T* slopes = in.gradients;
  for (int input = 0; input < kInputs; ++input) {
    if ((in.needs >> input & 1u) == 0) continue;
    T* const out = args.out[input];
    if (in.sum_nll && input == kInputs - 1) {
      double share = 0.0;
      for_each(n, [&](int64_t i) { share += value(slopes, i); });
      const double sum = block_sum(share);
      if (threadIdx.x == 0) *out = static_cast<T>(sum);
    } else {
      for_each(n, [&](int64_t i) { out[i] = static_cast<T>(value(slopes, i)); });
    }
    slopes += n;
  }

  const int64_t* order = in.order;
  for (const SortedLoss one : {kSortedAot, kSortedAotUnpaired}) {
    if ((in.sorted & one) == 0) continue;
    __syncthreads();  // other threads wrote the entries that follow from an order
    for_each(n, [&](int64_t i) {
      add_sorted_gradient(one, value(slopes, i), order[i], order[n + i], args.out);
    });
    order += 2 * n;
    slopes += n;
  }
}

}  // namespace

template <typename T>
void evaluate_pairs(const LossList& list, const PairOptions& options, const PairBatch<T>& batch,
                    double scale, unsigned needs, const PairResults<T>& out, double* scratch,
                    Stream stream) {
  launch(pairs<T>, dim3(1), dim3(kThreads), stream,
         PairArgs<T>{list, options, batch, scale, needs, out, scratch});
}

template <typename T>
void evaluate_unpaired(UnpairedLoss loss, const UnpairedOptions& options, int64_t count,
                       const T* logps, const T* ref_logps, const bool* desirable,
                       const T* shift_value, double scale, unsigned needs, T* total, T* losses,
                       T* rewards, T* gradients, Stream stream) {
  launch(completions<T>, dim3(1), dim3(kThreads), stream,
         UnpairedArgs<T>{loss, options, count, logps, ref_logps, desirable, shift_value, scale,
                         needs, total, losses, rewards, gradients});
}

template <typename T>
void scale_gradients(const GradientScale<T>& in, const T* grad_loss, T* const (&out)[kInputs],
                     Stream stream) {
  BackwardArgs<T> args{in, grad_loss, {}};
  for (int input = 0; input < kInputs; ++input) args.out[input] = out[input];
  launch(fusedpo::cuda::scale<T>, dim3(1), dim3(kThreads), stream, args);
}

#define FUSEDPO_INSTANTIATE(T)                                                                  \
  template void evaluate_pairs<T>(const LossList&, const PairOptions&, const PairBatch<T>&,     \
                                  double, unsigned, const PairResults<T>&, double*, Stream);    \
  template void evaluate_unpaired<T>(UnpairedLoss, const UnpairedOptions&, int64_t, const T*,   \
                                     const T*, const bool*, const T*, double, unsigned, T*, T*, \
                                     T*, T*, Stream);                                           \
  template void scale_gradients<T>(const GradientScale<T>&, const T*, T* const(&)[kInputs], Stream);
FUSEDPO_INSTANTIATE(float)
FUSEDPO_INSTANTIATE(double)
#undef FUSEDPO_INSTANTIATE

}  // namespace fusedpo::cuda
