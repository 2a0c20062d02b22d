// What forward and backward of linear_token_logps share on CUDA: the scored rows gathered into one
// matrix, their logits a chunk of rows at a time over the whole vocabulary, and the products with
// the weight.
//
//   X [n, H], U [n, r]    scored rows of hidden and lora_hidden in the compute type
//   W [V, H], B [V, r]    weight and lora_weight
//   x = X W^T + U B^T     [rows of a chunk, V], rows ld apart
//
// A W of another type than compute (fp32 under autocast) is cast tile by tile, never as a whole;
// products then fill or read column slices of the chunk. Otherwise the one tile is W itself.
//
// Under graph capture the number of scored rows stays on the device: n is then the number of
// positions, and rows past the scored ones are empty (see KeptRowsOut: -1).
#pragma once

#include <algorithm>

#include "cuda/linear_logps.h"
#include "ops/cuda_rows.h"
#include "ops/linear_arguments.h"

namespace fusedpo {

// Rows of kept and of a chunk start on cache lines, whatever V is: GEMMs need aligned rows.
constexpr int64_t padded_vocab(int64_t vocab) { return (vocab + 63) / 64 * 64; }

constexpr int64_t kUnknownCount = -1;  // of scored rows, under graph capture

class CudaHead {
 public:
  // count: how many rows are scored as forward found it (or kUnknownCount); absent: find out.
  CudaHead(const LinearArguments& arguments, const CudaDevice& device,
           std::optional<int64_t> count);

  const CudaDevice& device;
  const DType compute, result;
  const LogitTransform transform;
  const ScoredRows scored;
  const int64_t positions;
  const int64_t count;         // of scored rows, or kUnknownCount
  const int64_t n, vocab, ld;  // rows of X; ld: padded_vocab
  const int64_t tile_width, tiles;
  Tensor x, u;  // X and U; u is undefined without lora

  // Rows per chunk where its logits may take about `bytes`: equal chunks, so that none is small.
  int64_t chunk_rows(int64_t bytes) const;
  bool casts() const { return casts_; }

  Tensor logits_buffer(int64_t rows) const { return empty_as(x, {rows, ld}, compute); }

  // x of rows [begin, begin + m) into `to` [m, ld], and what the kernels need to know of them.
  cuda::LogitRows logits(int64_t begin, const Tensor& to);

  // hidden_out = d W and lora_out = d B for d [m, ld], each [m, C] of the result type; an undefined
  // one is left out. Sums run in the result type.
  void times_weights(const Tensor& d, const Tensor& hidden_out, const Tensor& lora_out);

  // One value of the result type on the device.
  Tensor constant(double value) const;

 private:
  struct Tile {
    int64_t begin, n;
    Tensor weight, lora_weight;  // [n, H] and [n, r] in the compute type
  };
  Tile operands(int64_t tile);
  Tensor gather(const Tensor& source) const;
  Tensor rounded_bias() const;
  void add_product(const Tensor& out, const Tensor& d, const Tensor& factor, bool first);

  const LinearArguments arguments_;
  const bool casts_;
  Tensor bias_, exact_;                       // [V], [n] of the result type, or undefined
  Tensor weight_cast_, lora_cast_, product_;  // scratch
  int64_t cast_tile_ = -1;                    // the tile that the scratch holds
};

}  // namespace fusedpo
