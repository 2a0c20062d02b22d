// exp, tanh and typed loads and stores that the compiler vectorises. Included by
// row_kernels_isa.cpp only, once per instruction set; everything has internal linkage.
#pragma once

#include <math.h>

#include "core/numeric.h"

namespace fusedpo {
namespace FUSEDPO_ISA {

// Where exp(x) leaves the normal range of its type. Below, it is taken to be 0, which also gives
// exp(-inf) = 0 without a special case.
static inline float exp_floor(float) { return -87.3f; }
static inline double exp_floor(double) { return -708.0; }

// exp(x) for x <= 0, within 1 ulp in fp32; NaN stays NaN. x = n ln2 + r, |r| <= ln2 / 2: a
// polynomial for exp(r), scaled by 2^n through the exponent field. ln2 is split so that n ln2_high
// is exact. The comparisons are written so that NaN fails them.
static inline float exp_nonpositive(float x) {
  const float floor = exp_floor(x);
  const float bounded = x < floor ? floor : x;
  const float n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;
  float r = bounded - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float value = p * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return x < floor ? 0.0f : value;
}

static inline double exp_nonpositive(double x) { return x < exp_floor(x) ? 0.0 : exp(x); }

// tanh within 2 ulp in fp32: an odd polynomial near 0, (1 - e) / (1 + e) with e = exp(-2|x|)
// beyond.
static inline float tanh_of(float x) {
  const float a = x < 0.0f ? -x : x;
  const float q = x * x;
  float p = -5.70498872745e-3f;
  p = p * q + 2.06390887954e-2f;
  p = p * q - 5.37397155531e-2f;
  p = p * q + 1.33314422036e-1f;
  p = p * q - 3.33332819422e-1f;
  const float small = x + x * q * p;
  const float e = exp_nonpositive(-2.0f * a);
  const float large = (1.0f - e) / (1.0f + e);
  return a < 0.625f ? small : (x < 0.0f ? -large : large);
}

static inline double tanh_of(double x) { return tanh(x); }

template <typename C, typename X>
static inline C load(X x) {
  return static_cast<C>(to_float(x));
}

template <typename C, typename Out>
static inline void store_all(const C* x, Out* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) from_float(static_cast<float>(x[i]), out + i);
}

static inline void store_all(const float* x, float* out, int64_t n) {
  if (x != out) memmove(out, x, static_cast<size_t>(n) * sizeof(float));
}

static inline void store_all(const double* x, double* out, int64_t n) {
  if (x != out) memmove(out, x, static_cast<size_t>(n) * sizeof(double));
}

template <typename C>
static void store_as(const C* x, void* out, DType type, int64_t n) {
  switch (type) {
    case DType::f32:
      return store_all(x, static_cast<float*>(out), n);
    case DType::bf16:
      return store_all(x, static_cast<bf16*>(out), n);
    case DType::f16:
      return store_all(x, static_cast<f16*>(out), n);
    case DType::f64:
      return store_all(x, static_cast<double*>(out), n);
  }
}

// Calls f with a pointer of the element type that `type` names.
template <typename F>
static inline auto with_type(DType type, const void* x, F f) {
  switch (type) {
    case DType::bf16:
      return f(static_cast<const bf16*>(x));
    case DType::f16:
      return f(static_cast<const f16*>(x));
    case DType::f64:
      return f(static_cast<const double*>(x));
    case DType::f32:
      break;
  }
  return f(static_cast<const float*>(x));
}

// Values summed in one go: blocks are summed first, then their sums, which keeps fp64 inputs exact.
constexpr int64_t kSumBlock = 256;

// Sums f(i), i in [0, n), in fp64: fp32 sums of a few hundred terms cost more than all terms' own
// errors, and how much depends on the width of a vector.
template <typename F>
static inline double sum_of(int64_t n, F f) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < n ? begin + kSumBlock : n;
    double part = 0.0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part += static_cast<double>(f(i));
    total += part;
  }
  return total;
}

template <typename C>
static inline C max_of(const C* x, int64_t begin, int64_t end) {
  C max = -static_cast<C>(INFINITY);
#pragma omp simd reduction(max : max)
  for (int64_t i = begin; i < end; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

}  // namespace FUSEDPO_ISA
}  // namespace fusedpo
