// Which rows are scored, and the scale of their gradients: one launch of one block each.
#include <cmath>

#include "cuda/reduce.cuh"
#include "cuda/row_results.cuh"
#include "cuda/rows.h"

namespace fusedpo::cuda {
namespace {

constexpr unsigned kThreads = 1024;
constexpr unsigned kWarps = kThreads / kWarpSize;

// Every warp takes a share of the positions: it counts, learns how many warps before it have
// counted, then numbers its own.
__global__ void __launch_bounds__(kThreads)
    number_rows(const int64_t* labels, int64_t count, int64_t vocab, int64_t ignore_index,
                KeptRowsOut out) {
  __shared__ int64_t counts[kWarps], invalid[kWarps];
  const int64_t share = (count + kThreads - 1) / kThreads * kWarpSize;
  const int64_t begin = warp_id() * share;
  const int64_t end = begin + share < count ? begin + share : count;
  const auto kept_at = [&](int64_t t) { return t < end && labels[t] != ignore_index; };

  int64_t kept = 0, first_invalid = INT64_MAX;
  for (int64_t t = begin + lane_id(); t - lane_id() < end; t += kWarpSize) {
    const bool keeps = kept_at(t);
    kept += __popc(__ballot_sync(kFullWarp, keeps));
    if (keeps && (labels[t] < 0 || labels[t] >= vocab) && t < first_invalid) first_invalid = t;
  }
  first_invalid = -warp_max(-first_invalid);
  if (lane_id() == 0) {
    counts[warp_id()] = kept;
    invalid[warp_id()] = first_invalid;
  }
  __syncthreads();
  int64_t before = 0, total = 0;
  for (unsigned w = 0; w < kWarps; ++w) {
    if (w < warp_id()) before += counts[w];
    total += counts[w];
    if (invalid[w] < first_invalid) first_invalid = invalid[w];
  }
  for (int64_t t = begin + lane_id(); t - lane_id() < end; t += kWarpSize) {
    const bool keeps = kept_at(t);
    const unsigned votes = __ballot_sync(kFullWarp, keeps);
    const int64_t i = before + __popc(votes & ((1u << lane_id()) - 1u));
    if (keeps) out.rows[i] = t;
    if (t < end) out.slot[t] = keeps ? i : -1;
    before += __popc(votes);
  }
  for (int64_t i = total + threadIdx.x; i < count; i += kThreads) out.rows[i] = -1;
  if (threadIdx.x == 0) {
    out.info[0] = total;
    out.info[1] = first_invalid == INT64_MAX ? -1 : first_invalid;
  }
}

template <typename R>
__global__ void __launch_bounds__(kThreads)
    scale_of_gradients(const void* c, const void* h, const int64_t* rows, int64_t n, R* out) {
  __shared__ double maxima[kWarps];
  double most = 0.0;  // infinity once a value is not finite
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const int64_t at = rows == nullptr ? i : rows[i];
    if (at < 0) continue;
    for (const void* values : {c, h}) {
      const double x = fabs(value_at<R>(values, at, 0.0));
      most = x <= most ? most : x == x ? x : static_cast<double>(INFINITY);
    }
  }
  most = warp_max(most);
  if (lane_id() == 0) maxima[warp_id()] = most;
  __syncthreads();
  most = warp_max(maxima[lane_id()]);
  if (threadIdx.x != 0) return;
  int exponent = 0;
  if (most > 0.0 && std::isfinite(most)) {
    if (frexp(most, &exponent) == 0.5) --exponent;
    const int limit = sizeof(R) == 8 ? 1022 : 126;  // so that the inverse is a normal number, too
    exponent = exponent > limit ? limit : exponent < -limit ? -limit : exponent;
  }
  out[0] = static_cast<R>(ldexp(1.0, exponent));
  out[1] = static_cast<R>(ldexp(1.0, -exponent));
}

}  // namespace

void find_kept_rows(const int64_t* labels, int64_t count, int64_t vocab, int64_t ignore_index,
                    const KeptRowsOut& out, Stream stream) {
  launch(number_rows, dim3(1), dim3(kThreads), stream, labels, count, vocab, ignore_index, out);
}

void find_gradient_scale(const void* c, const void* h, const int64_t* rows, int64_t n,
                         DType result_type, void* out, Stream stream) {
  if (result_type == DType::f64) {
    launch(scale_of_gradients<double>, dim3(1), dim3(kThreads), stream, c, h, rows, n,
           static_cast<double*>(out));
  } else {
    launch(scale_of_gradients<float>, dim3(1), dim3(kThreads), stream, c, h, rows, n,
           static_cast<float*>(out));
  }
}

}  // namespace fusedpo::cuda
