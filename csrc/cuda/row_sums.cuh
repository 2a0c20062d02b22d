// The reading pass: all sums over one row by one block, in one read.
//
// A thread sums batches of vectors in the compute type (at most 16 values into one register) and
// adds each batch to fp64 sums in units of 2^anchor. Its anchor begins at the label's logit and
// moves only when a logit exceeds it by more than kSlack bits: hardly ever. Threads meet in a fixed
// order. A value costs, besides its load: conversion (16-bit types), half a comparison (one for
// wider types), a multiply-add, a power, an addition, and with metrics three more.
#pragma once

#include "core/finish_row.h"
#include "cuda/reduce.cuh"
#include "cuda/row.cuh"

namespace fusedpo::cuda {

constexpr double kSlack = 11.5;  // 2^kSlack, and its square, are small for fp32

// Terms with 2^t = 0 count as nothing, also where t = -inf.
template <typename C>
__device__ inline C bounded_below(C t) {
  return t < C(-1e6) ? C(-1e6) : t;
}

// What a thread, a warp, then the block has seen of a row, the label left out.
template <typename C>
struct RowSums {
  C anchor;              // a whole number
  C max = -INFINITY;     // largest u
  int first = -1;        // where the first batch in which the thread saw it begins
  double rest = 0.0;     // sum 2^t, t = u bits - anchor
  double rest_t = 0.0;   // sum 2^t t
  double rest_sq = 0.0;  // sum 2^2t
  double sum = 0.0;      // sum u

  __device__ explicit RowSums(C anchor_ = 0) : anchor(anchor_) {}

  __device__ void move_anchor(C to) {
    const double shift = static_cast<double>(anchor) - static_cast<double>(to);
    const double factor = power_of_two(shift);
    rest_t = factor * (rest_t + rest * shift);
    rest *= factor;
    rest_sq *= factor * factor;
    anchor = to;
  }

  // Before values up to u come: keeps 2^t small.
  __device__ void make_room(C u_bits) {
    if (u_bits > anchor + static_cast<C>(kSlack)) move_anchor(std::ceil(u_bits));
  }

  template <bool kMetrics>
  __device__ void add(C u, C bits) {
    if (u > max) max = u;
    make_room(u * bits);
    const C t = std::fma(u, bits, -anchor), e = exp2_fast(t);
    rest += e;
    if constexpr (kMetrics) {
      rest_t += e * bounded_below(t);
      rest_sq += e * e;
      sum += u;
    }
  }

  // Takes out the term of the largest value as it was added. (The anchor has not moved since then:
  // it moves for larger values only.)
  __device__ void remove_largest(C bits) {
    const C t = std::fma(max, bits, -anchor), e = exp2_fast(t);
    rest -= e;
    rest_t -= static_cast<C>(e * t);
    rest_sq -= static_cast<C>(e * e);
  }
};

// What a thread adds of its batch that begins at `vector`: the vectors that lie in the row, and not
// the label's.
template <typename Row>
struct Batch {
  using T = typename Row::Value;
  const RowSplit<T>& split;
  int vector, label_vector;

  __device__ bool wants(int b) const {
    const int v = vector + 32 * b;
    return v < split.vectors && v != label_vector;
  }
  __device__ int begin(int b) const { return split.begin_of(vector + 32 * b); }
};

// kAll: every vector is wanted. Rows that are not plain are bound by their arithmetic, and go
// without this second copy of it.
template <typename Row, bool kMetrics, bool kAll>
__device__ inline void add_batch(const Row& row, const Words (&words)[Row::kBatch],
                                 const Batch<Row>& batch, RowSums<typename Row::C>* s) {
  using T = typename Row::Value;
  using C = typename Row::C;
  constexpr int kPer = kPerVector<T>, kBatch = Row::kBatch;

  C u[kBatch][kPer];
  C most = -INFINITY;
  if constexpr (Row::kPlain && kAll) {
    most = largest<T>(words);
  } else {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (!kAll && !batch.wants(b)) continue;
      if constexpr (Row::kPlain) {
        most = larger(most, largest<T>(reinterpret_cast<const Words(&)[1]>(words[b])));
      } else {
        unpack<T>(words[b], u[b]);
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          u[b][i] = row.u(u[b][i], batch.begin(b) + i);
          most = larger(most, u[b][i]);
        }
      }
    }
  }
  if (most > s->max) {
    s->max = most;
    s->first = batch.vector;
  }
  s->make_room(most * row.bits);

  const C anchor = s->anchor;
  C rest[2] = {0, 0}, rest_t[2] = {0, 0}, rest_sq[2] = {0, 0}, sum[2] = {0, 0};
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    if (!kAll && !batch.wants(b)) continue;
    if constexpr (Row::kPlain) unpack<T>(words[b], u[b]);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const C t = std::fma(u[b][i], row.bits, -anchor), e = exp2_fast(t);
      rest[i % 2] += e;
      if constexpr (kMetrics) {
        rest_t[i % 2] = std::fma(e, t, rest_t[i % 2]);
        rest_sq[i % 2] = std::fma(e, e, rest_sq[i % 2]);
        sum[i % 2] += u[b][i];
      }
    }
  }
  s->rest += rest[0] + rest[1];
  if constexpr (kMetrics) {
    settle(sum[0]);
    settle(sum[1]);
    s->rest_sq += rest_sq[0] + rest_sq[1];
    s->sum += sum[0] + sum[1];
    C of_t = rest_t[0] + rest_t[1];
    if (of_t != of_t) {  // a masked logit made 0 x inf (or there is a NaN, which stays)
      of_t = 0;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (!kAll && !batch.wants(b)) continue;
#pragma unroll 1
        for (int v = batch.begin(b); v < batch.begin(b) + kPer; ++v) {
          const C t = std::fma(u_at(row, v), row.bits, -anchor);
          of_t += exp2_fast(t) * bounded_below(t);
        }
      }
    }
    s->rest_t += of_t;
  }
}

// The values around the vectors and those that share a vector with the label: at most one for each
// thread of a warp. -1 for a thread that has none.
template <typename T>
__device__ inline int single_of(const RowSplit<T>& split, int label_vector) {
  int k = static_cast<int>(threadIdx.x);
  if (k < split.head) return k;
  k -= split.head;
  if (k < split.cols - split.tail) return split.tail + k;
  k -= split.cols - split.tail;
  return label_vector >= 0 && k < kPerVector<T> ? split.begin_of(label_vector) + k : -1;
}

// How vectors are read: aligned ones that somebody reads again soon or that nobody does, or ones
// that lie across boundaries.
enum class Read { kAgain, kLast, kShifted };

// What one thread sees of the row.
template <typename Row, bool kMetrics, Read kRead>
__device__ inline void sum_thread(const Row& row, const RowSplit<typename Row::Value>& split,
                                  int label, RowSums<typename Row::C>* s) {
  using T = typename Row::Value;
  constexpr int kBatch = Row::kBatch;
  using Plan = Batches<kBatch>;
  const unsigned past = static_cast<unsigned>(reinterpret_cast<uintptr_t>(row.data) % 16);
  const int label_vector = split.vector_of(label);
  const int label_batch = Plan::own_batch(label_vector);
  Batch<Row> batch{split, Plan::first(), label_vector};
  const T* from = row.data + split.begin_of(batch.vector);
#pragma unroll 1
  for (; batch.vector < split.vectors; batch.vector += Plan::step()) {
    Words words[kBatch];
    const bool all = kRead != Read::kShifted && batch.vector + 32 * (kBatch - 1) < split.vectors &&
                     batch.vector != label_batch;
    if (Row::kPlain && all) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const T* const at = from + b * 32 * kPerVector<T>;
        words[b] = kRead == Read::kLast ? load_words_last(at) : load_words(at);
      }
      add_batch<Row, kMetrics, true>(row, words, batch, s);
    } else {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (!batch.wants(b)) continue;
        const T* const at = from + b * 32 * kPerVector<T>;
        words[b] = kRead == Read::kShifted ? load_words_shifted(at, past) : load_words(at);
      }
      add_batch<Row, kMetrics, false>(row, words, batch, s);
    }
    from += Plan::step() * kPerVector<T>;
  }
  const int single = single_of(split, label_vector);
  if (single >= 0 && single != label) s->template add<kMetrics>(u_at(row, single), row.bits);
}

// Whether the thread saw a value equal to `u` before the label; it has none above.
template <typename Row>
__device__ inline bool tie_before(const Row& row, const RowSplit<typename Row::Value>& split,
                                  int label, typename Row::C u, int first) {
  const int label_vector = split.vector_of(label);
  const int single = single_of(split, label_vector);
  bool found = single >= 0 && single < label && u_at(row, single) == u;
  if (first < 0) return found;
  const Batch<Row> batch{split, first, label_vector};
#pragma unroll 1
  for (int b = 0; b < Row::kBatch; ++b) {
    if (!batch.wants(b) || batch.begin(b) > label) continue;
#pragma unroll 1
    for (int i = 0; i < kPerVector<typename Row::Value>; ++i) {
      found = found || u_at(row, batch.begin(b) + i) == u;
    }
  }
  return found;
}

// A function of its own, so that it takes no register from the reading of aligned rows.
template <typename Row, bool kMetrics>
__device__ FUSEDPO_OUTLINED RowSums<typename Row::C> sum_shifted(
    const Row& row, const RowSplit<typename Row::Value>& split, int label,
    RowSums<typename Row::C> s) {
  sum_thread<Row, kMetrics, Read::kShifted>(row, split, label, &s);
  return s;
}

// All lanes get the sums of the warp; `max` stays a thread's own.
template <bool kMetrics, typename C>
__device__ inline void merge_warp(RowSums<C>* s) {
  s->move_anchor(warp_max(s->anchor));
  s->rest = warp_sum(s->rest);
  if constexpr (kMetrics) {
    s->rest_t = warp_sum(s->rest_t);
    s->rest_sq = warp_sum(s->rest_sq);
    s->sum = warp_sum(s->sum);
  }
}

// Every thread gets the sums of the block.
template <bool kMetrics, typename C>
__device__ inline void merge_block(RowSums<C>* s) {
  __shared__ C anchors[kWarpSize];
  __shared__ double sums[kWarpSize][4];
  merge_warp<kMetrics>(s);
  __syncthreads();  // the last call's results were read
  if (lane_id() == 0) {
    const unsigned w = warp_id();
    anchors[w] = s->anchor;
    sums[w][0] = s->rest;
    if constexpr (kMetrics) {
      sums[w][1] = s->rest_t;
      sums[w][2] = s->rest_sq;
      sums[w][3] = s->sum;
    }
  }
  __syncthreads();
  const unsigned w = lane_id();
  const bool is_warp = w < blockDim.x / kWarpSize;
  s->anchor = is_warp ? anchors[w] : anchors[0];
  s->rest = is_warp ? sums[w][0] : 0.0;
  if constexpr (kMetrics) {
    s->rest_t = is_warp ? sums[w][1] : 0.0;
    s->rest_sq = is_warp ? sums[w][2] : 0.0;
    s->sum = is_warp ? sums[w][3] : 0.0;
  }
  merge_warp<kMetrics>(s);
}

// A scored row's results and, for its gradient, 1 - tanh^2 at its label.
struct RowScore {
  RowResult result;
  double relative_slope;
};

// From sums in bits of u to results in nats of z; `bits` per nat, `inner` z per u. The sums are of
// u - origin and lack `largest` terms of the largest value max_u, as they lack the label's: where
// nearly all of the mass is one value's, the rounding of its term would be as large as all else.
__device__ FUSEDPO_OUTLINED inline void finish_sums(double anchor, double max_u, int largest,
                                                    double rest, double rest_t, double rest_sq,
                                                    double sum_u, double bits, double inner,
                                                    double origin, double target, bool beaten,
                                                    int cols, RowResult* out) {
  RowStats stats;
  stats.target = target;
  const double max_z = inner * max_u;
  stats.max = target > max_z ? target : max_z;
  const double lift = anchor - (stats.max - inner * origin) * bits;
  const double factor = exp2(lift);
  stats.rest = factor * rest;
  stats.rest_z = factor * (rest_t + rest * lift) / bits;
  stats.rest_sq = factor * factor * rest_sq;
  if (largest != 0) {
    const double below = max_z - stats.max, term = exp(below);
    stats.rest += largest * term;
    stats.rest_z += largest * term * below;
    stats.rest_sq += largest * term * term;
  }
  stats.sum = inner * sum_u;
  stats.seen = true;
  stats.beaten = beaten;
  *out = finish_row(stats, cols);
}

// Reads a row; `score` is shared and written by thread 0. Every thread of the block calls it.
// kLast: nobody reads the row again; then the results do not depend on where it lies, either: rows
// of an odd length may change places. label_value(x) is the label's x in higher precision than the
// row's.
template <typename Row, bool kMetrics, bool kLast, typename LabelValue>
__device__ inline void score_row(const Row& row, int cols, int label, LabelValue label_value,
                                 RowScore* score) {
  using C = typename Row::C;
  using Split = RowSplit<typename Row::Value>;
  const Split split = kLast ? Split(cols) : Split(row.data, cols);
  const C label_x = static_cast<C>(to_float(row.data[label])), label_u = row.u(label_x, label);
  const C label_bits = label_u * row.bits;
  // A masked label is no anchor: the first value that is not masked will be.
  RowSums<C> s(is_extreme<C>(label_u, row.bits) || !(fabs(label_bits) < INFINITY)
                   ? C(-0x1p24)
                   : std::ceil(label_bits));
  if constexpr (!kLast) {
    sum_thread<Row, kMetrics, Read::kAgain>(row, split, label, &s);
  } else if (reinterpret_cast<uintptr_t>(row.data) % 16 == 0) {
    sum_thread<Row, kMetrics, Read::kLast>(row, split, label, &s);
  } else {
    s = sum_shifted<Row, kMetrics>(row, split, label, s);
  }
  const C most = block_max(s.max), top = larger(most, label_u);
  const bool holds = s.max == most && most > label_u;
  if (holds) s.remove_largest(row.bits);
  int largest = __syncthreads_count(holds);
  merge_block<kMetrics>(&s);

  const bool extreme = is_extreme<C>(top, row.bits);  // the same for the whole block
  if (extreme) {
    RowSums<C> shifted(0);
    for (int v = static_cast<int>(threadIdx.x); v < cols; v += static_cast<int>(blockDim.x)) {
      if (v != label) shifted.template add<kMetrics>(u_at(row, v) - top, row.bits);
    }
    merge_block<kMetrics>(&shifted);
    s.anchor = shifted.anchor;
    s.rest = shifted.rest;
    s.rest_t = shifted.rest_t;
    s.rest_sq = shifted.rest_sq;
    largest = 0;
  }

  // Nothing stands before the first value: there even -inf, or NaN as in torch, is a maximum.
  bool beaten = most > label_u || (label > 0 && !(label_u > -INFINITY));
  if (most == label_u && !beaten) {  // the same for the whole block
    beaten =
        __syncthreads_or(s.max == most && tie_before(row, split, label, label_u, s.first)) != 0;
  }
  if (threadIdx.x != 0) return;
  const double inner = row.inner();
  const LabelLogit of_label = label_logit(row, label, label_value(static_cast<double>(label_x)));
  score->relative_slope = of_label.relative_slope;
  finish_sums(s.anchor, most, largest, s.rest, s.rest_t, s.rest_sq,
              s.sum + static_cast<double>(label_u), static_cast<double>(row.bits) / inner, inner,
              extreme ? top : 0.0, of_label.z, beaten, cols, &score->result);
}

}  // namespace fusedpo::cuda
