// exp and tanh of packs. Included by row_kernels_isa.cpp only, once per instruction set; everything
// has internal linkage.
#pragma once

#include <math.h>

#include "cpu/pack.h"

namespace fusedpo {
namespace FUSEDPO_ISA {

// Where exp(x) leaves the normal range of its type. Below, it is taken to be 0, which also gives
// exp(-inf) = 0 without a special case.
static inline float exp_floor(float) { return -87.3f; }
static inline double exp_floor(double) { return -708.0; }

// x, but no less than exp_floor; NaN stays NaN.
template <typename P, typename C>
static inline P bounded_below(P x, C floor) {
  return x < floor ? splat(floor) : x;
}

// exp(x) for x <= 88, within 1 ulp in fp32; NaN stays NaN. x = n ln2 / k + r: 2^(n / k) by a table
// of k entries and the exponent, times a polynomial for exp(r). ln2 is split so that n times its
// high part is exact; n is rounded by adding 1.5 2^23, which leaves it in the low bits. The
// comparisons are written so that NaN fails them.
#if defined(__AVX512F__)
// k = 16: a table of one register, read by one permutation, for which the polynomial is short.
static inline Floats exp_of(Floats x) {
  const Floats table = {1.0f,          1.0442737824f, 1.0905077327f, 1.1387886348f,
                        1.1892071150f, 1.2418578121f, 1.2968395547f, 1.3542555469f,
                        1.4142135624f, 1.4768261459f, 1.5422108254f, 1.6104903319f,
                        1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f};
  const Floats shifted = x * 23.0831206542f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  Floats r = x - n * 0.0433349609375f;
  r = r + n * 1.32621525e-5f;
  const Floats entry = (Floats)_mm512_permutexvar_ps((__m512i)shifted, (__m512)table);
  // Of the shifted bits, 4 are the entry and what 1.5 2^23 added leaves at the top.
  const Floats power = (Floats)((Words)entry + (((Words)shifted >> 4) << 23));
  Floats p = r * 0.166666672f + 0.5f;
  p = p * r + 1.0f;
  const Floats value = power * r * p + power;
  return x < exp_floor(0.0f) ? Floats{} : value;
}
#else
static inline Floats exp_of(Floats x) {  // k = 1
  const Floats shifted = x * 1.44269504f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Words power = ((Words)shifted << 23) + 0x3f800000u;
  const Floats value = p * (Floats)power;
  return x < exp_floor(0.0f) ? Floats{} : value;
}
#endif

static inline double exp_of(double x) { return x < exp_floor(x) ? 0.0 : exp(x); }

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
