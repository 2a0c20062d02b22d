// What kernels ask of the hardware beyond C++: launches, 16-byte accesses, packed conversions, the
// fast exponential. Every PTX instruction has a portable twin of the same result, so that a host
// compiler can build and run the same kernels; then <cuda_runtime.h> is the emulation's.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "core/numeric.h"
#include "cuda/stream.h"

namespace fusedpo::cuda {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told once: the next launch is not to blame
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

// Enqueues kernel(args...) on `stream`.
#ifdef __CUDACC__
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, Stream stream, const Args&... args) {
  kernel<<<grid, block, 0, stream>>>(args...);
  check(cudaGetLastError(), "launching a kernel");
}
#else
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, Stream stream, const Args&... args) {
  cuda_host::launch(kernel, grid, block, stream, args...);
  check(cudaGetLastError(), "launching a kernel");
}
#endif

// ---- 16 bytes of a row ----------------------------------------------------------

struct alignas(16) Words {
  uint32_t w[4];
};

__device__ inline Words load_words(const void* p) { return *static_cast<const Words*>(p); }

// Of what nobody reads again: the line is the first to leave the caches.
__device__ inline Words load_words_last(const void* p) {
#ifdef __CUDA_ARCH__
  const uint4 v = __ldcs(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
#else
  return load_words(p);
#endif
}

// The 16 bytes at p, which lies `past` bytes (an even number, not 0) after a 16-byte boundary: from
// the two aligned vectors around them, whose other bytes are read, too. The second one is what the
// next thread reads first, so memory is read once.
__device__ inline Words load_words_shifted(const void* p, unsigned past) {
  const char* const aligned = static_cast<const char*>(p) - past;
  const Words low = load_words(aligned), high = load_words(aligned + 16);
  uint32_t w[8] = {low.w[0],  low.w[1],  low.w[2],  low.w[3],
                   high.w[0], high.w[1], high.w[2], high.w[3]};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = (past & 8u) != 0 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = (past & 4u) != 0 ? w[i + 1] : w[i];
  Words out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.w[i] = (past & 2u) != 0 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
  return out;
}

// Of what is too large to be found in a cache by whoever reads it.
__device__ inline void store_words(void* p, const Words& words) {
#ifdef __CUDA_ARCH__
  __stcs(static_cast<uint4*>(p), make_uint4(words.w[0], words.w[1], words.w[2], words.w[3]));
#else
  *static_cast<Words*>(p) = words;
#endif
}

// ---- two 16-bit values in a word ------------------------------------------------
// The value at the lower address is in the lower half.

__device__ inline uint16_t low_half(uint32_t word) { return static_cast<uint16_t>(word); }
__device__ inline uint16_t high_half(uint32_t word) { return static_cast<uint16_t>(word >> 16); }

__device__ inline void unpack(uint32_t word, bf16*, float* low, float* high) {
  *low = bits_to_float(word << 16);
  *high = bits_to_float(word & 0xffff0000u);
}

__device__ inline void unpack(uint32_t word, f16*, float* low, float* high) {
#ifdef __CUDA_ARCH__
  asm("{\n .reg .f16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;\n}"
      : "=f"(*low), "=f"(*high)
      : "r"(word));
#else
  *low = to_float(f16{low_half(word)});
  *high = to_float(f16{high_half(word)});
#endif
}

// To nearest, ties to even.
__device__ inline uint32_t pack(float low, float high, bf16*) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  bf16 l, h;
  from_float(low, &l);
  from_float(high, &h);
  return l.bits | static_cast<uint32_t>(h.bits) << 16;
#endif
}

__device__ inline uint32_t pack(float low, float high, f16*) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  f16 l, h;
  from_float(low, &l);
  from_float(high, &h);
  return l.bits | static_cast<uint32_t>(h.bits) << 16;
#endif
}

// The larger of each half; of a NaN and a number the number.
template <typename T>
__device__ inline uint32_t portable_max_halves(uint32_t a, uint32_t b) {
  const auto larger = [](uint16_t x, uint16_t y) {
    const float fx = to_float(T{x}), fy = to_float(T{y});
    return fx > fy || !(fy == fy) ? x : y;
  };
  return larger(low_half(a), low_half(b)) |
         static_cast<uint32_t>(larger(high_half(a), high_half(b))) << 16;
}

__device__ inline uint32_t max_halves(uint32_t a, uint32_t b, bf16*) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
#else
  return portable_max_halves<bf16>(a, b);
#endif
}

__device__ inline uint32_t max_halves(uint32_t a, uint32_t b, f16*) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
#else
  return portable_max_halves<f16>(a, b);
#endif
}

// ---- arithmetic -----------------------------------------------------------------

// 2^x within 2 ulp; 0 below the normal range, NaN stays NaN.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

__device__ FUSEDPO_OUTLINED inline double exp2_fast(double x) { return exp2(x); }

// 1 / x within 1 ulp, for x in the normal range.
__device__ inline float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

__device__ inline double reciprocal(double x) { return 1.0 / x; }

// Has x computed by here. Where a value is not needed until after a branch, the compiler would
// rather put it off and keep all that it is made of in registers.
__device__ inline void settle(float& x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(x));
#else
  (void)x;
#endif
}

__device__ inline void settle(double& x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+d"(x));
#else
  (void)x;
#endif
}

// 2^n for a whole number n <= 0; 0 from n = -1000 on.
__device__ inline double power_of_two(double n) {
  if (!(n > -1000.0)) return n == n ? 0.0 : n;
  const int64_t bits = static_cast<int64_t>(n + 1023.0) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace fusedpo::cuda
