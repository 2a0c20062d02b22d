#include "toy_kernels.h"

#include <cuda_runtime.h>

namespace toy {
namespace {

__global__ void block_sum_kernel(const float* x, float* out) {
  __shared__ float partial[32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += partial[w];
  out[blockIdx.x] = sum;
}

__global__ void shuffles_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_sync(0xffffffffu, lane, 35);
  out[32 + lane] = __shfl_up_sync(0xffffffffu, lane, 3u);
  out[64 + lane] = __shfl_down_sync(0xffffffffu, lane, 3u);
  out[96 + lane] = __shfl_xor_sync(0xffffffffu, lane, 12, 8);
  out[128 + lane] = __shfl_sync(0xffffffffu, lane, 2, 16);
}

__global__ void votes_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int results[] = {static_cast<int>(__ballot_sync(0xffffffffu, lane % 2)),
                         __any_sync(0xffffffffu, lane == 7), __all_sync(0xffffffffu, lane < 31),
                         __reduce_add_sync(0xffffffffu, lane), __syncthreads_count(lane == 4)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < 5; ++i) out[i] = results[i];
  }
}

__global__ void barrier_in_a_branch_kernel(bool right) {
  if (right || threadIdx.x < 40) __syncthreads();
}

__global__ void different_barriers_kernel(bool right) {
  if (right || threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_after_an_exit_kernel(bool right) {
  if (!right && threadIdx.x == 3) return;
  __syncthreads();
}

__global__ void shuffle_without_a_lane_kernel(bool right) {
  if (right || threadIdx.x != 9) __shfl_down_sync(0xffffffffu, 1, 1u);
}

__global__ void shuffle_from_outside_the_mask_kernel(bool right) {
  if (threadIdx.x < 16) __shfl_xor_sync(0xffffu, 1, right ? 8 : 16);
}

__global__ void shuffle_without_the_caller_kernel(bool right) {
  __shfl_sync(right ? 0xffffffffu : 0xffu, 1, 0);
}

__global__ void full_mask_kernel() { __shfl_down_sync(0xffffffffu, 1, 1u); }

__global__ void misaligned_load_kernel(const void* at, uint4* out) {
  *out = __ldg(static_cast<const uint4*>(at));
}

__global__ void reverse_kernel(const int* x, int* out, bool synced) {
  __shared__ int values[256];
  const unsigned i = threadIdx.x;
  values[i] = x[i];
  if (synced) __syncthreads();
  out[i] = values[blockDim.x - 1 - i];
}

__global__ void swap_neighbours_kernel(const int* x, int* out, bool synced) {
  __shared__ int values[32];
  const unsigned i = threadIdx.x;
  values[i] = x[i];
  if (synced) {
    __syncwarp();
  } else {
    __shfl_sync(0xffffffffu, 0, 0);
  }
  out[i] = values[i ^ 1];
}

__global__ void read_shared_kernel(uint32_t* out, bool written) {
  __shared__ uint32_t values[64];
  if (written) values[threadIdx.x] = 7;
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x];
}

__global__ void reuse_shared_kernel(const int* x, int* out, bool synced) {
  __shared__ int value;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) value = x[round];
    __syncthreads();
    out[round * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)] = value;
    if (synced) __syncthreads();
  }
}

__global__ void write_one_place_kernel(int* out, bool own) { out[own ? blockIdx.x : 0] = 1; }

__global__ void read_the_next_kernel(int* x, bool wrong) {
  const unsigned from = wrong && blockIdx.x + 1 < gridDim.x ? blockIdx.x + 1 : blockIdx.x;
  x[blockIdx.x] = x[from] + 1;
}

__global__ void copy_kernel(const int* from, int* to, unsigned n) {
  for (unsigned i = threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
}

__global__ void note_order_kernel(int* next, int* order) {
  order[(*next)++] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

__global__ void nothing_kernel() {}

}  // namespace

void block_sum(const float* x, float* out, unsigned blocks, unsigned threads, cudaStream_t stream) {
  cuda_host::launch(block_sum_kernel, blocks, threads, stream, x, out);
}

void shuffles(int* out) { cuda_host::launch(shuffles_kernel, 1, 32, nullptr, out); }
void votes(int* out) { cuda_host::launch(votes_kernel, 1, 64, nullptr, out); }

void barrier_in_a_branch(bool right) {
  cuda_host::launch(barrier_in_a_branch_kernel, 1, 64, nullptr, right);
}
void different_barriers(bool right) {
  cuda_host::launch(different_barriers_kernel, 1, 64, nullptr, right);
}
void barrier_after_an_exit(bool right) {
  cuda_host::launch(barrier_after_an_exit_kernel, 1, 64, nullptr, right);
}
void shuffle_without_a_lane(bool right) {
  cuda_host::launch(shuffle_without_a_lane_kernel, 1, 32, nullptr, right);
}
void shuffle_from_outside_the_mask(bool right) {
  cuda_host::launch(shuffle_from_outside_the_mask_kernel, 1, 32, nullptr, right);
}
void shuffle_without_the_caller(bool right) {
  cuda_host::launch(shuffle_without_the_caller_kernel, 1, 32, nullptr, right);
}
void shuffle_in_half_a_block_of_16(bool right) {
  cuda_host::launch(full_mask_kernel, 1, right ? 32 : 16, nullptr);
}

void misaligned_load(const void* at) {
  uint4 out;
  cuda_host::launch(misaligned_load_kernel, 1, 1, nullptr, at, &out);
}

void reverse(const int* x, int* out, unsigned threads, bool synced) {
  cuda_host::launch(reverse_kernel, 1, threads, nullptr, x, out, synced);
}
void swap_neighbours(const int* x, int* out, bool synced) {
  cuda_host::launch(swap_neighbours_kernel, 1, 32, nullptr, x, out, synced);
}
void read_shared(uint32_t* out, unsigned blocks, bool written) {
  cuda_host::launch(read_shared_kernel, blocks, 64, nullptr, out, written);
}
void reuse_shared(const int* x, int* out, bool synced) {
  cuda_host::launch(reuse_shared_kernel, 1, 64, nullptr, x, out, synced);
}
void write_one_place(int* out, bool own) {
  cuda_host::launch(write_one_place_kernel, 4, 1, nullptr, out, own);
}
void read_the_next(int* x, bool wrong) {
  cuda_host::launch(read_the_next_kernel, 4, 1, nullptr, x, wrong);
}
void copy(const int* from, int* to, unsigned n) {
  cuda_host::launch(copy_kernel, 1, 32, nullptr, from, to, n);
}
void note_order(int* next, int* order, unsigned blocks, unsigned threads) {
  cuda_host::launch(note_order_kernel, blocks, threads, nullptr, next, order);
}

int launch_shape(unsigned blocks, unsigned threads) {
  cuda_host::launch(nothing_kernel, blocks, threads, nullptr);
  return cudaGetLastError();
}

}  // namespace toy
