// A row of logits as a block sees it: whole 16-byte vectors, a few single values around them, and
// the map from a stored value x to what is summed.
//
//   u = x           and z = inner u   for rows without bias and softcap: nothing is computed
//   u = f(x + bias) and z = u         for the others
//
// Sums and gradients then work in bits: exp(z - max) = 2^(u bits - anchor), one fused multiply-add
// (a single rounding, also where u is large) and one instruction for the power. Anchors are whole
// numbers, so moving one multiplies by a power of two and rounds nothing. A row has less than 2^31
// values.
#pragma once

#include "core/logit_row.h"
#include "cuda/device.cuh"

namespace fusedpo::cuda {

constexpr double kLog2e = 1.44269504088896340736;

// The type of a row's arithmetic; sums over more than a few dozen values are fp64.
template <typename T>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::Type;

template <typename T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

// ---- the values of one vector, in the compute type ------------------------------

template <typename T>
__device__ inline void unpack(const Words& words, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    unpack(words.w[i], static_cast<T*>(nullptr), &x[2 * i], &x[2 * i + 1]);
}

template <typename T>
__device__ inline void unpack(const Words& words, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = bits_to_float(words.w[i]);
}

template <typename T>
__device__ inline void unpack(const Words& words, double (&x)[2]) {
  memcpy(x, words.w, sizeof words);
}

template <typename T>
__device__ inline Words pack_all(const float (&x)[8]) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i) words.w[i] = pack(x[2 * i], x[2 * i + 1], static_cast<T*>(nullptr));
  return words;
}

template <typename T>
__device__ inline Words pack_all(const float (&x)[4]) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i) words.w[i] = float_to_bits(x[i]);
  return words;
}

template <typename T>
__device__ inline Words pack_all(const double (&x)[2]) {
  Words words;
  memcpy(words.w, x, sizeof words);
  return words;
}

// Of a NaN and a number the number.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// The largest value of several vectors. Halves are compared two at a time, before they are
// converted.
template <typename T, int kCount>
__device__ inline Compute<T> largest(const Words (&words)[kCount]) {
  if constexpr (sizeof(T) == 2) {
    T* const type = nullptr;
    uint32_t pair = words[0].w[0];
#pragma unroll
    for (int i = 1; i < 4 * kCount; ++i) pair = max_halves(pair, words[i / 4].w[i % 4], type);
    float low, high;
    unpack(pair, type, &low, &high);
    return larger(low, high);
  } else {
    Compute<T> most = -INFINITY;
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      Compute<T> x[kPerVector<T>];
      unpack<T>(words[b], x);
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) most = larger(most, x[i]);
    }
    return most;
  }
}

// ---- where a row's vectors lie --------------------------------------------------

// Values [0, head) come before the first vector, then come `vectors` vectors, then [tail, cols).
template <typename T>
struct RowSplit {
  int head, vectors, tail, cols;

  // Vectors lie on 16-byte boundaries.
  __device__ RowSplit(const T* data, int cols_) : cols(cols_) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
    head = past == 0 ? 0 : kPerVector<T> - past;
    head = head < cols ? head : cols;
    vectors = (cols - head) / kPerVector<T>;
    tail = head + vectors * kPerVector<T>;
  }

  // Vectors lie at the same columns wherever the row begins, with a vector's room on both sides:
  // the aligned vectors around each lie within the row's memory.
  __device__ explicit RowSplit(int cols_) : cols(cols_) {
    head = cols < kPerVector<T> ? cols : kPerVector<T>;
    const int whole = (cols - head) / kPerVector<T>;
    vectors = whole > 1 ? whole - 1 : 0;
    tail = head + vectors * kPerVector<T>;
  }

  // The vector that value v is in, or -1.
  __device__ int vector_of(int v) const {
    return v < head || v >= tail ? -1 : (v - head) / kPerVector<T>;
  }

  __device__ int begin_of(int vector) const { return head + vector * kPerVector<T>; }
};

// Which vectors a thread takes. A batch of a warp is kBatch runs of 32 neighbouring vectors, one
// for each lane; warps take batches in turn. `vector` is a thread's first one of a batch, and the
// others follow at steps of 32.
template <int kBatch>
struct Batches {
  static constexpr int kVectors = kBatch * static_cast<int>(kWarpSize);

  __device__ static int first() {
    const int thread = static_cast<int>(threadIdx.x);
    return thread / 32 * kVectors + thread % 32;
  }
  __device__ static int step() { return static_cast<int>(blockDim.x) / 32 * kVectors; }
  // The first vector of the batch that holds `vector`, if it is this thread's; else -1.
  __device__ static int own_batch(int vector) {
    if (vector < 0 || vector % 32 != static_cast<int>(threadIdx.x) % 32) return -1;
    const int begin = vector - vector % kVectors / 32 * 32;
    return begin % step() == first() ? begin : -1;
  }
};

// ---- two kinds of rows ----------------------------------------------------------

// Whether u bits is too large to have a fraction: there an anchor, which is one rounding away from
// it, could be far off. Nobody's logits are like that but those of a row masked by finite numbers.
template <typename C>
__device__ inline bool is_extreme(double u, double bits) {
  return fabs(u) < static_cast<double>(INFINITY) &&
         !(fabs(u * bits) < (sizeof(C) == 4 ? 0x1p24 : 0x1p53));
}

template <typename T>
struct PlainRow {
  using Value = T;
  using C = Compute<T>;
  static constexpr bool kPlain = true;
  static constexpr int kBatch = sizeof(T) == 8 ? 2 : 4;  // vectors that a thread has in flight

  const T* data;
  const LogitTransform& f;
  C bits;  // per u

  __device__ PlainRow(const T* data_, const LogitTransform& f_, const void*)
      : data(data_), f(f_), bits(static_cast<C>(inner() * kLog2e)) {}

  __device__ double inner() const { return f.scale / f.temperature; }  // z per u, positive
  __device__ C u(C x, int) const { return x; }
  // d z / d x where tanh' = 1, and what the factor tanh' is elsewhere.
  __device__ double slope() const { return inner(); }
  __device__ C relative_slope(C) const { return 1; }
  __device__ double bias_at(int) const { return 0.0; }
};

// tanh within 3 ulp: an odd polynomial near 0, (1 - e) / (1 + e) with e = exp(-2|x|) beyond.
__device__ inline float tanh_of(float x) {
  const float a = fabsf(x), q = x * x;
  float p = -5.70498872745e-3f;
  p = fmaf(p, q, 2.06390887954e-2f);
  p = fmaf(p, q, -5.37397155531e-2f);
  p = fmaf(p, q, 1.33314422036e-1f);
  p = fmaf(p, q, -3.33332819422e-1f);
  const float small = fmaf(x * q, p, x);
  const float e = exp2_fast(-2.885390081777927f * a);
  const float large = copysignf((1.0f - e) * reciprocal(1.0f + e), x);
  return a < 0.625f ? small : large;
}

__device__ FUSEDPO_OUTLINED inline double tanh_of(double x) { return tanh(x); }

// With bias, softcap or a scale that is not positive.
template <typename T>
struct TransformedRow {
  using Value = T;
  using C = Compute<T>;
  static constexpr bool kPlain = false;
  static constexpr int kBatch = 1;  // bound by arithmetic

  const T* data;
  const LogitTransform& f;
  const C* bias;  // by column, or null
  bool capped;
  C scale, cap, u_to_tanh, bits;

  __device__ TransformedRow(const T* data_, const LogitTransform& f_, const void* bias_)
      : data(data_),
        f(f_),
        bias(static_cast<const C*>(bias_)),
        capped(f.softcap > 0.0),
        scale(static_cast<C>(f.scale / (capped ? f.softcap : f.temperature))),
        cap(static_cast<C>(capped ? f.softcap / f.temperature : 0.0)),
        u_to_tanh(static_cast<C>(capped ? f.temperature / f.softcap : 0.0)),
        bits(static_cast<C>(kLog2e)) {}

  __device__ double inner() const { return 1.0; }
  __device__ C u(C x, int v) const {
    const C in = scale * (bias == nullptr ? x : x + bias[v]);
    return capped ? cap * tanh_of(in) : in;
  }
  __device__ double slope() const { return f.scale / f.temperature; }
  __device__ C relative_slope(C u) const {
    const C t = u * u_to_tanh;
    return capped ? (1 - t) * (1 + t) : C(1);  // without a cap u may be infinite
  }
  __device__ double bias_at(int v) const {
    return bias == nullptr ? 0.0 : static_cast<double>(bias[v]);
  }
};

// The label's z in fp64, and 1 - tanh^2 there.
struct LabelLogit {
  double z, relative_slope;
};

__device__ FUSEDPO_OUTLINED inline LabelLogit transformed(double x, double scale, double softcap,
                                                          double temperature) {
  if (!(softcap > 0.0)) return {scale * x / temperature, 1.0};
  const double t = tanh(scale * x / softcap);
  return {softcap * t / temperature, (1.0 - t) * (1.0 + t)};
}

// From the label's x without bias.
template <typename Row>
__device__ inline LabelLogit label_logit(const Row& row, int label, double x) {
  return transformed(x + row.bias_at(label), row.f.scale, row.f.softcap, row.f.temperature);
}

template <typename Row>
__device__ inline typename Row::C u_at(const Row& row, int v) {
  return row.u(static_cast<typename Row::C>(to_float(row.data[v])), v);
}

inline bool is_plain(const LogitTransform& f, const void* bias) {
  return bias == nullptr && !(f.softcap > 0.0) && f.scale > 0.0;
}

}  // namespace fusedpo::cuda
