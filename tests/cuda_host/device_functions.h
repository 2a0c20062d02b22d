// Device functions: barriers, warp operations, cached loads and stores, bits and fast mathematics.
// Included by cuda_runtime.h.
#pragma once

// The line of the kernel's source, not of this file.
#define FUSEDPO_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FUSEDPO_SITE) {
  cuda_host::barrier(cuda_host::Vote::kCount, 0, {file, line});
}
inline int __syncthreads_count(int predicate, FUSEDPO_SITE) {
  return cuda_host::barrier(cuda_host::Vote::kCount, predicate, {file, line});
}
inline int __syncthreads_and(int predicate, FUSEDPO_SITE) {
  return cuda_host::barrier(cuda_host::Vote::kAnd, predicate, {file, line});
}
inline int __syncthreads_or(int predicate, FUSEDPO_SITE) {
  return cuda_host::barrier(cuda_host::Vote::kOr, predicate, {file, line});
}

inline void __syncwarp(unsigned mask = ~0u, FUSEDPO_SITE) {
  cuda_host::warp(cuda_host::WarpOp::kSync, mask, 0, 0, {file, line});
}
inline int __all_sync(unsigned mask, int predicate, FUSEDPO_SITE) {
  return cuda_host::warp(cuda_host::WarpOp::kAll, mask, predicate != 0, 0, {file, line}) != 0;
}
inline int __any_sync(unsigned mask, int predicate, FUSEDPO_SITE) {
  return cuda_host::warp(cuda_host::WarpOp::kAny, mask, predicate != 0, 0, {file, line}) != 0;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FUSEDPO_SITE) {
  return static_cast<unsigned>(
      cuda_host::warp(cuda_host::WarpOp::kBallot, mask, predicate != 0, 0, {file, line}));
}

namespace cuda_host {

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8 && sizeof(T) >= 4,
                "CUDA shuffles int, unsigned, long, long long, float and double");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp(WarpOp::kShuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FUSEDPO_UNCHECKED inline unsigned lane() { return current == nullptr ? 0 : current->lane; }

}  // namespace cuda_host

// Lanes are in segments of `width`, a power of two; a lane keeps its value where the source lies
// past the segment.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, FUSEDPO_SITE) {
  const unsigned w = static_cast<unsigned>(width), lane = cuda_host::lane();
  const unsigned from = (lane & ~(w - 1)) | (static_cast<unsigned>(source) & (w - 1));
  return cuda_host::shuffle(mask, value, from, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, FUSEDPO_SITE) {
  const unsigned w = static_cast<unsigned>(width), lane = cuda_host::lane();
  const unsigned from = (lane & (w - 1)) < delta ? lane : lane - delta;
  return cuda_host::shuffle(mask, value, from, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, FUSEDPO_SITE) {
  const unsigned w = static_cast<unsigned>(width), lane = cuda_host::lane();
  const unsigned from = (lane & (w - 1)) + delta >= w ? lane : lane + delta;
  return cuda_host::shuffle(mask, value, from, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, FUSEDPO_SITE) {
  const unsigned w = static_cast<unsigned>(width), lane = cuda_host::lane();
  const unsigned other = lane ^ static_cast<unsigned>(lane_mask);
  const unsigned from = other > (lane | (w - 1)) ? lane : other;
  return cuda_host::shuffle(mask, value, from, {file, line});
}

#define FUSEDPO_REDUCE(name, op)                                                             \
  template <typename T>                                                                      \
  T name(unsigned mask, T value, FUSEDPO_SITE) {                                             \
    static_assert(std::is_integral_v<T> && sizeof(T) == 4, "CUDA reduces int and unsigned"); \
    return static_cast<T>(cuda_host::warp(cuda_host::WarpOp::op, mask,                       \
                                          static_cast<uint64_t>(value), 0, {file, line}));   \
  }
FUSEDPO_REDUCE(__reduce_add_sync, kAdd)
FUSEDPO_REDUCE(__reduce_min_sync, kMin)
FUSEDPO_REDUCE(__reduce_max_sync, kMax)
FUSEDPO_REDUCE(__reduce_and_sync, kAnd)
FUSEDPO_REDUCE(__reduce_or_sync, kOr)
FUSEDPO_REDUCE(__reduce_xor_sync, kXor)
#undef FUSEDPO_REDUCE
#undef FUSEDPO_SITE

// Hints to the caches are plain accesses here, but must be aligned.
#define FUSEDPO_LOAD(name)          \
  template <typename T>             \
  T name(const T* at) {             \
    return *cuda_host::aligned(at); \
  }
FUSEDPO_LOAD(__ldg)
FUSEDPO_LOAD(__ldcs)
FUSEDPO_LOAD(__ldcg)
FUSEDPO_LOAD(__ldlu)
#undef FUSEDPO_LOAD
#define FUSEDPO_STORE(name)   \
  template <typename T>       \
  void name(T* at, T value) { \
    cuda_host::aligned(at);   \
    *at = value;              \
  }
FUSEDPO_STORE(__stcs)
FUSEDPO_STORE(__stcg)
FUSEDPO_STORE(__stwt)
#undef FUSEDPO_STORE

template <typename To, typename From>
To fusedpo_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline int __float_as_int(float x) { return fusedpo_bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return fusedpo_bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return fusedpo_bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return fusedpo_bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return fusedpo_bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return fusedpo_bit_cast<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
