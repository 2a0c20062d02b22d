// What forward and backward of linear_token_logps share: the scored rows gathered into one matrix,
// and the vocabulary walked in tiles whose operands are in the GEMM's type.
//
//   X [n, H], U [n, r]    scored rows of hidden and lora_hidden
//   W [V, H], B [V, r]    weight and lora_weight, seen tile by tile
//   x = X W^T + U B^T     [n, V], never whole: one [rows of a block, columns of a tile] at a time
#pragma once

#include <algorithm>

#include "cpu/row_kernels.h"
#include "ops/gemm_cpu.h"
#include "ops/linear_arguments.h"

namespace fusedpo {

// Operands of one tile of the vocabulary, columns [begin, begin + n).
struct VocabTile {
  int64_t begin, n;
  Tensor weight;       // [n, H] in the GEMM's type
  Tensor lora_weight;  // [n, r], undefined without lora
  Tensor bias;         // [n] in the result type, undefined without bias

  const void* bias_data() const { return bias.defined() ? bias.const_data_ptr() : nullptr; }
};

class LinearProblem {
 public:
  explicit LinearProblem(const LinearArguments& arguments);

  const DType compute;  // what operands are rounded to
  const DType gemm;     // what GEMMs multiply: compute, or fp32 where that is faster
  const DType result;   // fp32 or fp64: sums, results, gradients before their last rounding
  const LogitTransform transform;
  const KeptRows kept;
  const int64_t n, vocab, tile_width, tiles;
  const int64_t block;  // rows of one block: a block's tile of logits is about 1M values
  Tensor x;             // X in the GEMM's type
  Tensor u;             // U, undefined without lora

  int64_t tile_columns(int64_t tile) const {
    return std::min(tile_width, vocab - tile * tile_width);
  }

  // The operands of one tile; valid until the next call, which may reuse their storage.
  VocabTile operands(int64_t tile);

  // out [rows, tile.n] = logits before bias and transform of rows [begin, begin + rows), in the
  // GEMM's type, stored at the start of `scratch`.
  Tensor logits(const VocabTile& tile, int64_t begin, int64_t rows, const Tensor& scratch) const;

  // sum += a @ b, sum in the result type. Where the GEMM's own type is narrower, its product is
  // rounded once into `scratch` and added from there.
  void add_product(const Tensor& sum, const Tensor& scratch, const Tensor& a,
                   const Tensor& b) const;
  // Room for add_product with `cols` columns; undefined where it needs none.
  Tensor product_scratch(int64_t cols) const {
    return gemm == result ? Tensor() : empty_as(x, {block * cols}, gemm);
  }

  // The weight's (or lora_weight's) row of a label, rounded to compute, in the result type. Reads
  // memory only, so it may be called from any thread.
  void weight_row(int64_t label, void* out) const { weight_row_of(weight_, label, out); }
  void lora_weight_row(int64_t label, void* out) const { weight_row_of(*lora_weight_, label, out); }

 private:
  Tensor gather(const Tensor& source) const;
  Tensor tile_of(const Tensor& source, int64_t begin, int64_t n, DType type, Tensor& scratch) const;
  void weight_row_of(const Tensor& weight, int64_t label, void* out) const;

  const Tensor weight_;
  const OptionalTensor bias_, lora_weight_;
  Tensor weight_scratch_, lora_scratch_, bias_scratch_;
};

// to[i] = from[i] rounded to `through`, over `rows` dense rows, on all threads.
void convert_rows(const Tensor& from, DType through, const Tensor& to);

}  // namespace fusedpo
