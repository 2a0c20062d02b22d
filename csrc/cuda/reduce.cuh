// Sums and maxima over a warp or a block, in one fixed order.
#pragma once

#include "cuda/device.cuh"

namespace fusedpo::cuda {

__device__ inline unsigned lane_id() { return threadIdx.x % kWarpSize; }
__device__ inline unsigned warp_id() { return threadIdx.x / kWarpSize; }

// Every lane gets the result.
template <typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (unsigned step = kWarpSize / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

template <typename T>
__device__ inline T warp_max(T x) {
#pragma unroll
  for (unsigned step = kWarpSize / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// Of a block of whole warps; every thread gets the result and must call it.
__device__ inline double block_sum(double x) {
  __shared__ double parts[kWarpSize];
  x = warp_sum(x);
  __syncthreads();  // the last call's parts were read
  if (lane_id() == 0) parts[warp_id()] = x;
  __syncthreads();
  return warp_sum(lane_id() < blockDim.x / kWarpSize ? parts[lane_id()] : 0.0);
}

template <typename T>
__device__ inline T block_max(T x) {
  __shared__ T parts[kWarpSize];
  x = warp_max(x);
  __syncthreads();  // the last call's parts were read
  if (lane_id() == 0) parts[warp_id()] = x;
  __syncthreads();
  return warp_max(parts[lane_id() < blockDim.x / kWarpSize ? lane_id() : 0]);
}

}  // namespace fusedpo::cuda
