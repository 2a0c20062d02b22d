// The vectors the kernels are written in: one native vector of floats, or one double where the
// arithmetic is fp64. Included by row_kernels_isa.cpp only, once per instruction set; everything
// has internal linkage. GCC's and Clang's vector extension, so one source serves every processor;
// the few intrinsics below are what it cannot express, or what GCC 12 does not find.
//
// Explicit vectors and not loops for the compiler to vectorise: the order of every sum is in the
// source, so it is the same whatever else a loop computes.
#pragma once

#include <string.h>

#include "core/numeric.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fusedpo {
namespace FUSEDPO_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else  // SSE2, NEON, or what the compiler makes of it
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef float HalfFloats __attribute__((vector_size(2 * kWidth)));
typedef double Doubles __attribute__((vector_size(4 * kWidth)));  // half as many

// The same in memory of any alignment. Not memcpy, of which GCC makes two moves of half a vector
// and a wait for both.
template <typename V, typename X>
struct Unaligned {
  typedef V Type __attribute__((aligned(alignof(X)), may_alias));
};

template <typename V, typename X>
static inline V read(const X* x) {
  return *reinterpret_cast<const typename Unaligned<V, X>::Type*>(x);
}

template <typename V, typename X>
static inline void write(V value, X* x) {
  *reinterpret_cast<typename Unaligned<V, X>::Type*>(x) = value;
}

template <typename C>
struct PackOf;
template <>
struct PackOf<float> {
  using Type = Floats;
  static constexpr int64_t width = kWidth;
};
template <>
struct PackOf<double> {
  using Type = double;
  static constexpr int64_t width = 1;
};
template <typename C>
using Pack = typename PackOf<C>::Type;

template <typename C>
static inline Pack<C> splat(C value) {
  return Pack<C>{} + value;
}

// ---- conversions: GCC 12 makes nine instructions of what are one or two
// ---------------------------

static inline Words widened(Halves x) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}

static inline Halves narrowed(Words x) {  // each below 2^16
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x, Halves);
#endif
}

static inline void widened(Floats x, Doubles* low, Doubles* high) {
#if defined(__AVX512F__)
  *low = (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
  *high = (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
#elif defined(__AVX2__)
  *low = (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
  *high = (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
#else
  HalfFloats part[2];
  memcpy(part, &x, sizeof part);
  *low = __builtin_convertvector(part[0], Doubles);
  *high = __builtin_convertvector(part[1], Doubles);
#endif
}

// ---- arithmetic ---------------------------------------------------------------------------------

// Rounded once with AVX2, whatever else becomes of the product. Elsewhere that is the compiler's
// choice; there the product is an exponential's, with a power of two, and exact.
static inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

static inline double multiply_add(double a, double b, double c) { return a * b + c; }

// a where a > b, else b, also where one is NaN. GCC 12 makes three instructions of it where one is
// a constant.
static inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

static inline double larger(double a, double b) { return a > b ? a : b; }

#if defined(__AVX2__)
// table[index modulo kWidth].
static inline Words entry_of(Words table, Words index) {
#if defined(__AVX512F__)
  return (Words)_mm512_permutexvar_epi32((__m512i)index, (__m512i)table);
#else
  return (Words)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)index);
#endif
}
#endif

// ---- memory -------------------------------------------------------------------------------------

// Asks for the `bytes` that are read a page after x. A processor that computes as much on the way
// as an exponential looks too little ahead by itself, and never beyond a page: with this, a pass
// over logits in memory takes three quarters of the time. Nothing happens where there is no memory.
static inline void fetch_ahead(const void* x, int64_t bytes) {
  constexpr int64_t page = 4096, line = 64;
  for (int64_t i = 0; i < bytes; i += line) {
    __builtin_prefetch(static_cast<const char*>(x) + page + i);
  }
}

static inline void load_pack(const float* x, Floats* out) { *out = read<Floats>(x); }

static inline void load_pack(const bf16* x, Floats* out) {
  *out = (Floats)(widened(read<Halves>(x)) << 16);
}

static inline void load_pack(const f16* x, Floats* out) {
#if defined(__AVX512F__)
  *out = (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__F16C__)
  *out = (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else  // to_float of numeric.h
  const Words half = widened(read<Halves>(x)), magnitude = half & 0x7fffu;
  const Floats normal = (Floats)(magnitude << 13) * 0x1p112f;
  const Floats subnormal = __builtin_convertvector((Ints)magnitude, Floats) * 0x1p-24f;
  const Words finite = (Words)(magnitude < 0x400u ? subnormal : normal);
  const Words special = magnitude >= 0x7c00u ? Words{} + 0x7f800000u : Words{};
  *out = (Floats)(finite | special | ((half & 0x8000u) << 16));
#endif
}

static inline void load_pack(const double* x, double* out) { *out = *x; }

static inline void store_pack(Floats x, float* out) { write(x, out); }

// The rounding of from_float.
// Not AVX-512's own conversion, which flushes subnormals to zero: bf16 has the range of float, and
// so have its gradients.
static inline void store_pack(Floats x, bf16* out) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words chosen = x == x ? rounded : Words{} + 0x7fc0u;
  write(narrowed(chosen), out);
}

static inline void store_pack(Floats x, f16* out) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else  // from_float of numeric.h
  const Words bits = (Words)x, magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
  Words half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
  write(narrowed(half | ((bits >> 16) & 0x8000u)), out);
#endif
}

static inline void store_pack(double x, double* out) { *out = x; }

// `count` <= width values, `fill` behind them.
template <typename C, typename X>
static inline Pack<C> load_some(const X* x, int64_t count, C fill) {
  constexpr int64_t width = PackOf<C>::width;
  Pack<C> pack;
  if (count == width) {
    load_pack(x, &pack);
    return pack;
  }
  C padded[width];
  for (int64_t i = 0; i < width; ++i) padded[i] = i < count ? to_float(x[i]) : fill;
  load_pack(padded, &pack);
  return pack;
}

template <typename P, typename Out>
static inline void store_some(P x, Out* out, int64_t count) {
  Out padded[sizeof(P) / 4];
  store_pack(x, padded);
  for (int64_t i = 0; i < count; ++i) out[i] = padded[i];
}

// out[i] = f(x[i]) by packs; out may be x.
template <typename C, typename X, typename Out, typename F>
static inline void map(const X* x, Out* out, int64_t n, F f) {
  constexpr int64_t width = PackOf<C>::width;
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    Pack<C> v;
    load_pack(x + i, &v);
    store_pack(f(v), out + i);
  }
  if (i < n) store_some(f(load_some<C>(x + i, n - i, C(0))), out + i, n - i);
}

// out[i] = f(x[i], y[i]); out may be x or y.
template <typename C, typename X, typename Out, typename F>
static inline void map2(const X* x, const C* y, Out* out, int64_t n, F f) {
  constexpr int64_t width = PackOf<C>::width;
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    Pack<C> v, w;
    load_pack(x + i, &v);
    load_pack(y + i, &w);
    store_pack(f(v, w), out + i);
  }
  if (i < n) {
    const Pack<C> v = load_some<C>(x + i, n - i, C(0)), w = load_some<C>(y + i, n - i, C(0));
    store_some(f(v, w), out + i, n - i);
  }
}

// Calls f with a pointer of the element type that `type` names: double where the arithmetic is in
// double, which takes no other, and one of the narrower types where it is in float.
template <typename C, typename F>
static inline auto with_type(DType type, const void* x, F f) {
  if constexpr (sizeof(C) == 8) {
    return f(static_cast<const double*>(x));
  } else {
    if (type == DType::bf16) return f(static_cast<const bf16*>(x));
    if (type == DType::f16) return f(static_cast<const f16*>(x));
    return f(static_cast<const float*>(x));
  }
}

template <typename T>
static inline T* same_type(const T*, void* x) {
  return static_cast<T*>(x);
}

// ---- sums and maxima ----------------------------------------------------------------------------

// A sum in fp64, of packs of floats or of doubles. fp32 sums of a few hundred terms would cost more
// than all terms' own errors.
template <typename C>
struct Sum;

template <>
struct Sum<float> {
  Doubles low{}, high{};

  void add(Floats x) {
    Doubles a, b;
    widened(x, &a, &b);
    low += a;
    high += b;
  }
  double total() const {
    const Doubles both = low + high;
    double total = 0.0;
    for (int i = 0; i < kWidth / 2; ++i) total += both[i];
    return total;
  }
};

template <>
struct Sum<double> {
  double value = 0.0;

  void add(double x) { value += x; }
  double total() const { return value; }
};

static inline float largest(Floats x) {
  float max = x[0];
  for (int i = 1; i < kWidth; ++i) max = x[i] > max ? x[i] : max;
  return max;
}
static inline double largest(double x) { return x; }

static inline float first(Floats x) { return x[0]; }
static inline double first(double x) { return x; }

}  // namespace FUSEDPO_ISA
}  // namespace fusedpo
