// Small kernels, right and wrong, by which the CUDA emulation and its checks are tested.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace toy {

// out[block] = sum of x[block * threads .. ), by shuffles, then through shared memory.
void block_sum(const float* x, float* out, unsigned blocks, unsigned threads, CUstream_st* stream);

// What each lane gets: [5][32] for shfl, up, down, xor within 8, and a broadcast within 16.
void shuffles(int* out);
// [5]: ballot of the odd lanes, any(lane == 7), all(lane < 31), reduce_add, count over 2 warps.
void votes(int* out);

// Each does one thing wrong, or, where `right`, the same thing right.
void barrier_in_a_branch(bool right);
void different_barriers(bool right);
void barrier_after_an_exit(bool right);
void shuffle_without_a_lane(bool right);
void shuffle_from_outside_the_mask(bool right);
void shuffle_without_the_caller(bool right);
void shuffle_in_half_a_block_of_16(bool right);
void misaligned_load(const void* at);  // wants a multiple of 16

// out[i] = x[threads - 1 - i] through shared memory; `synced` puts the barrier.
void reverse(const int* x, int* out, unsigned threads, bool synced);
// out[lane] = x[lane ^ 1] through shared memory in one warp, ordered by __syncwarp or by nothing.
void swap_neighbours(const int* x, int* out, bool synced);
// out[thread] = what it finds in shared memory at the start.
void read_shared(uint32_t* out, unsigned blocks, bool written);
// A loop that forgets to wait before it writes shared memory again.
void reuse_shared(const int* x, int* out, bool synced);
// Every block writes out[0] or out[block].
void write_one_place(int* out, bool own);
// Block i reads x[i + 1] after block i + 1 may have written it.
void read_the_next(int* x, bool wrong);
void copy(const int* from, int* to, unsigned n);
// order[i] = which block, or thread, was the i-th to run; racy on purpose.
void note_order(int* next, int* order, unsigned blocks, unsigned threads);

// 0, or the error that launching it gives.
int launch_shape(unsigned blocks, unsigned threads);

}  // namespace toy
