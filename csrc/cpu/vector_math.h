// exp and tanh of packs. Included by row_kernels_isa.cpp only, once per instruction set; everything
// has internal linkage.
#pragma once

#include <math.h>

#include "cpu/pack.h"

namespace fusedpo {
namespace FUSEDPO_ISA {

// The largest x, about, of which exp(x) is exactly 0 here: what the smallest numbers lose counts
// for nothing in a sum that holds exp(0), or nearly.
static inline float exp_floor(float) { return -88.03f; }
static inline double exp_floor(double) { return -746.0; }

// x, but no less than exp_floor; NaN stays NaN.
static inline Floats bounded_below(Floats x, float floor) { return larger(splat(floor), x); }
static inline double bounded_below(double x, double floor) { return larger(floor, x); }

// exp(x) as a product: in a sum it costs one operation, a fused multiply-add.
template <typename P>
struct Exp {
  P factor, power;

  P value() const { return factor * power; }
  P added_to(P sum) const { return multiply_add(factor, power, sum); }
};

// exp(x) for exp_floor <= x <= 88, in fp32 within 2.4e-7 + |x| 3e-9 of itself above -87.3; NaN
// stays NaN. With x = n ln2 / k + r the power is 2^(n / k), the factor a polynomial for exp(r). n
// is rounded by adding 1.5 2^23, which leaves it in the low bits. At exp_floor it is -127 k, where
// all bits of the power are 0.
#if defined(__AVX2__)
// k: the entries of a table that fills a register. One permutation reads it and takes the index
// from the lowest bits; the polynomial is short then, and a pass takes a sixth less time than with
// k = 1. An entry is the bits of 2^(i / k) less what its index leaves behind when n is shifted into
// the exponent.
static inline Exp<Floats> exp_bounded(Floats x) {
#if defined(__AVX512F__)
  constexpr int shift = 19;
  constexpr float per_n = 0.0433216989f, second = 0.500016212f;
  const Words table = {0x3f800000u, 0x3f7daac3u, 0x3f7b95c2u, 0x3f79c3d3u, 0x3f7837f0u, 0x3f76f532u,
                       0x3f75fed7u, 0x3f75583fu, 0x3f7504f3u, 0x3f7508a4u, 0x3f75672au, 0x3f76248cu,
                       0x3f7744fdu, 0x3f78ccdfu, 0x3f7ac0c7u, 0x3f7d257du};
#else
  constexpr int shift = 20;
  constexpr float per_n = 0.0866433978f, second = 0.500064790f;
  const Words table = {0x3f800000u, 0x3f7b95c2u, 0x3f7837f0u, 0x3f75fed7u,
                       0x3f7504f3u, 0x3f75672au, 0x3f7744fdu, 0x3f7ac0c7u};
#endif
  const Floats shifted = x * (1.44269504f * kWidth) + 12582912.0f;
  const Floats r = multiply_add(shifted - 12582912.0f, splat(-per_n), x);
  // `second` is a little above 1/2: it makes up for r^4 / 24, which is left out.
  const Floats factor = ((r * 0.166666672f + second) * r + 1.0f) * r + 1.0f;
  return {factor, (Floats)(entry_of(table, (Words)shifted) + ((Words)shifted << shift))};
}
#else  // k = 1
static inline Exp<Floats> exp_bounded(Floats x) {
  constexpr float bias = 127.0f;  // the exponent of 1
  const Floats shifted = x * 1.44269504f + (12582912.0f + bias);
  const Floats n = shifted - (12582912.0f + bias);
  // ln2 in two parts, so that n times the first is exact.
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * r * r + r + 1.0f, (Floats)((Words)shifted << 23)};
}
#endif

static inline Exp<double> exp_bounded(double x) { return {exp(x), 1.0}; }

template <typename P>
static inline P exp_of(P x) {
  return exp_bounded(bounded_below(x, exp_floor(first(x)))).value();
}

// tanh within 2 ulp in fp32: an odd polynomial near 0, (1 - e) / (1 + e) with e = exp(-2|x|)
// beyond.
static inline Floats tanh_of(Floats x) {
  const Floats a = x < 0.0f ? -x : x;
  const Floats q = x * x;
  Floats p = q * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * q - 5.37397155531e-2f;
  p = p * q + 1.33314422036e-1f;
  p = p * q - 3.33332819422e-1f;
  const Floats small = x + x * q * p;
  const Floats e = exp_of(-2.0f * a);
  const Floats large = (1.0f - e) / (1.0f + e);
  return a < 0.625f ? small : (x < 0.0f ? -large : large);
}

static inline double tanh_of(double x) { return tanh(x); }

}  // namespace FUSEDPO_ISA
}  // namespace fusedpo
