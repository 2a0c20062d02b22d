// The writing pass: d loss / d x over one row by one block, from the row and what is known of it.
//
//   d loss / d x_v = k (1 - tanh^2) (g_l (1[v = y] - p_v) - g_h p_v (log p_v + h))
//
// with g_l, g_h the upstream gradients of logp and entropy, h the entropy, k = scale / temperature.
// With t = u bits - anchor, p_v = 2^t f and log p_v = (t - c) / bits per nat: so off the label it
// is 2^t (constant + linear t), times 1 - tanh^2. A value costs, besides its load and its store:
// two conversions (16-bit types), a multiply-add, a power and a multiplication. Vectors are walked
// from the end of the row: what the reading pass read last is still in the L2 cache.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/row.cuh"
#include "cuda/row_sums.cuh"

namespace fusedpo::cuda {

struct RowCoefficients {
  double anchor, constant, linear;
  double at_label;  // the label's own entry
  bool extreme;     // the anchor is the row's largest value
};

// `bits` per nat; k = scale / temperature, times whatever the caller wants; label_z: used where the
// entropy has a gradient.
__device__ FUSEDPO_OUTLINED inline void find_coefficients(const RowGradient& g, double bits,
                                                          double k, double label_z,
                                                          double relative_slope,
                                                          RowCoefficients* out) {
  RowCoefficients& c = *out;
  const double top = c.extreme ? 0.0 : g.max * bits;
  c.anchor = std::ceil(top);
  const double below = top - c.anchor;
  const double share = -k * exp(-g.log_sum) * exp2(-below);
  c.constant = share * (g.grad_logp + g.grad_entropy * (g.entropy - g.log_sum - below / bits));
  c.linear = share * g.grad_entropy / bits;
  double at_label = g.grad_logp * g.rest_share;
  if (g.grad_entropy != 0.0) {
    // max is rounded: near p = 1 that would be all there is.
    const double logp = g.rest_share < 0.5 ? log1p(-g.rest_share) : label_z - g.max - g.log_sum;
    const double p = exp(logp);
    at_label -= p == 0.0 ? 0.0 : g.grad_entropy * p * (logp + g.entropy);
  }
  c.at_label = k * relative_slope * at_label;
}

// The same in the compute type.
template <typename C>
struct Slopes {
  C shift, anchor, constant, linear;  // shift: what is taken off u first, mostly 0
};

template <typename Row, bool kEntropy>
__device__ inline typename Row::C gradient_of(const Row& row, typename Row::C u,
                                              const Slopes<typename Row::C>& c) {
  using C = typename Row::C;
  const C t = std::fma(u - c.shift, row.bits, -c.anchor);
  const C e = exp2_fast(t);
  const C g = e * (kEntropy ? std::fma(c.linear, bounded_below(t), c.constant) : c.constant);
  return Row::kPlain ? g : g * row.relative_slope(u);
}

template <typename T>
__device__ inline void store_value(T* out, Compute<T> x) {
  from_float(x, out);
}

// Writes every entry; `out` may be the row itself. Then the label's is still wrong.
template <typename Row, bool kEntropy>
__device__ inline void write_row(const Row& row, const RowSplit<typename Row::Value>& split,
                                 const Slopes<typename Row::C>& c, typename Row::Value* out) {
  using T = typename Row::Value;
  constexpr int kPer = kPerVector<T>, kBatch = Row::kBatch;
  using Plan = Batches<kBatch>;
  const bool aligned = reinterpret_cast<uintptr_t>(out + split.head) % 16 == 0;
  const int batches = (split.vectors - Plan::first() + Plan::step() - 1) / Plan::step();
  for (int k = batches - 1; k >= 0; --k) {
    const int vector = Plan::first() + k * Plan::step(), begin = split.begin_of(vector);
    Words words[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      words[b] = Words{};
      if (vector + 32 * b < split.vectors)
        words[b] = load_words_last(row.data + begin + 32 * b * kPer);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const bool inside = vector + 32 * b < split.vectors;
      if (!Row::kPlain && !inside) continue;  // there is no bias
      const int v = begin + 32 * b * kPer;
      typename Row::C x[kPer];
      unpack<T>(words[b], x);
#pragma unroll
      for (int i = 0; i < kPer; ++i) x[i] = gradient_of<Row, kEntropy>(row, row.u(x[i], v + i), c);
      if (!inside) continue;
      if (aligned) {
        store_words(out + v, pack_all<T>(x));
      } else {
#pragma unroll
        for (int i = 0; i < kPer; ++i) store_value(out + v + i, x[i]);
      }
    }
  }
  const int single = single_of(split, -1);
  if (single >= 0) {
    store_value(out + single, gradient_of<Row, kEntropy>(row, u_at(row, single), c));
  }
}

// d loss / d x times `scale` to `out`, which may be the row. Every thread of the block calls it; g,
// which is shared, and relative_slope (1 - tanh^2 at the label) are thread 0's.
template <typename Row, bool kMayHaveEntropy>
__device__ inline void write_gradient(const Row& row, int cols, int label, const RowGradient& g,
                                      double relative_slope, double scale,
                                      typename Row::Value* out) {
  using C = typename Row::C;
  __shared__ RowCoefficients shared;
  if (threadIdx.x == 0) {
    const double inner = row.inner(), bits = static_cast<double>(row.bits);
    double z = 0.0;
    if (kMayHaveEntropy && g.grad_entropy != 0.0) {
      z = label_logit(row, label, static_cast<double>(to_float(row.data[label]))).z;
    }
    shared.extreme = is_extreme<C>(g.max / inner, bits);
    find_coefficients(g, bits / inner, scale * row.slope(), z, relative_slope, &shared);
  }
  __syncthreads();
  Slopes<C> c{0, static_cast<C>(shared.anchor), static_cast<C>(shared.constant),
              static_cast<C>(shared.linear)};
  if (shared.extreme) {  // stats round it, when they divide by the temperature
    C most = -INFINITY;
    for (int v = static_cast<int>(threadIdx.x); v < cols; v += static_cast<int>(blockDim.x)) {
      most = larger(most, u_at(row, v));
    }
    c.shift = block_max(most);
  }
  const RowSplit<typename Row::Value> split(row.data, cols);
  if (kMayHaveEntropy && c.linear != C(0)) {
    write_row<Row, true>(row, split, c, out);
  } else {
    write_row<Row, false>(row, split, c, out);
  }
  __syncthreads();  // the label's entry is written twice
  if (threadIdx.x == 0) store_value(out + label, static_cast<C>(shared.at_label));
}

// A row of zeros.
template <typename T>
__device__ inline void write_zeros(T* out, int cols) {
  const RowSplit<T> split(out, cols);
  for (int i = static_cast<int>(threadIdx.x); i < split.vectors;
       i += static_cast<int>(blockDim.x)) {
    store_words(out + split.begin_of(i), Words{});
  }
  const int single = single_of(split, -1);
  if (single >= 0) out[single] = T{};
}

}  // namespace fusedpo::cuda
