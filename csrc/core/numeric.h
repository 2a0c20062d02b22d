// Element types and their conversions, shared by every kernel.
//
// Everything is `static inline`: the CPU kernels compile this header once per instruction set, and
// a function with external linkage compiled for AVX-512 could be the copy the linker keeps.
#pragma once

#include <stdint.h>
#include <string.h>

// FUSEDPO_HD: for host and device. FUSEDPO_OUTLINED: called on the device rather than copied to
// every call: what runs once for a row or a pair, and is long.
#ifdef __CUDACC__
#define FUSEDPO_HD __host__ __device__
#define FUSEDPO_OUTLINED __noinline__
#else
#define FUSEDPO_HD
#define FUSEDPO_OUTLINED
#endif

namespace fusedpo {

enum class DType : int { f32, bf16, f16, f64 };

// The upper half of a float.
struct bf16 {
  uint16_t bits;
};

// IEEE binary16.
struct f16 {
  uint16_t bits;
};

FUSEDPO_HD static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FUSEDPO_HD static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FUSEDPO_HD static inline float to_float(float value) { return value; }
FUSEDPO_HD static inline double to_float(double value) { return value; }

FUSEDPO_HD static inline float to_float(bf16 value) {
  return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}

// The exponent is moved by a multiplication; subnormal halves are converted as the integers they
// are, so that a processor told to flush subnormal floats keeps them.
FUSEDPO_HD static inline float to_float(f16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const float normal = bits_to_float(magnitude << 13) * 0x1p112f;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const float finite = magnitude < 0x400u ? subnormal : normal;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
  return bits_to_float(float_to_bits(finite) | special | sign);
}

FUSEDPO_HD static inline void from_float(float value, float* out) { *out = value; }
FUSEDPO_HD static inline void from_float(double value, double* out) { *out = value; }

// To nearest, ties to even. NaN apart: rounding could carry it into infinity.
FUSEDPO_HD static inline void from_float(float value, bf16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

// To nearest, ties to even; overflow gives infinity, small values subnormals.
FUSEDPO_HD static inline void from_float(float value, f16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal range: move the exponent and round away 13 bits.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 makes the hardware round to the spacing of half's subnormals.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out->bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

}  // namespace fusedpo
