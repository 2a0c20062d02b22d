#include "ops/linear_problem.h"

namespace fusedpo {
namespace {

constexpr int64_t kBlockValues = int64_t{1} << 20;  // logits of one block's tile
constexpr int64_t kSmallestBlock = 128;             // rows below which a GEMM loses speed

int64_t checked_tile(int64_t vocab_tile) {
  STD_TORCH_CHECK(vocab_tile >= 1 && vocab_tile <= kMaxSegment, "vocab_tile must be in [1, ",
                  kMaxSegment, "]; got ", vocab_tile);
  return vocab_tile;
}

int64_t rows_per_block(int64_t n, int64_t vocab_tile) {
  const int64_t most = std::max(kSmallestBlock, kBlockValues / vocab_tile);
  const int64_t blocks = std::max<int64_t>(1, (n + most - 1) / most);
  return (n + blocks - 1) / blocks;  // equal blocks: none is left small
}

}  // namespace

void convert_rows(const Tensor& from_in, DType through, const Tensor& to) {
  const Tensor from = with_dense_rows(from_in);
  const Rows in(from), out(to);
  const DType in_type = dtype_of(from), out_type = dtype_of(to);
  const RowKernels& kernels = row_kernels();
  torch::stable::parallel_for(0, in.count(), row_grain(in.cols()), [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) {
      kernels.convert(in_type, in.row(i), through, out_type, out.row(i), in.cols());
    }
  });
}

LinearProblem::LinearProblem(const LinearArguments& arguments)
    : compute(arguments.compute),
      gemm(gemm_type(compute)),
      result(result_type(compute)),
      transform(arguments.transform),
      kept(kept_rows(arguments.labels, arguments.weight.size(0), arguments.ignore_index)),
      n(kept.count()),
      vocab(arguments.weight.size(0)),
      tile_width(checked_tile(arguments.vocab_tile)),
      tiles((vocab + tile_width - 1) / tile_width),
      block(rows_per_block(n, tile_width)),
      weight_(arguments.weight),
      bias_(arguments.bias),
      lora_weight_(arguments.lora_weight) {
  arguments.check();
  x = gather(arguments.hidden);
  if (arguments.lora_hidden) u = gather(*arguments.lora_hidden);
}

Tensor LinearProblem::gather(const Tensor& source_in) const {
  const Tensor source = with_dense_rows(source_in);
  const Rows rows(source);
  const Tensor out = empty_as(source, {n, rows.cols()}, gemm);
  char* data = static_cast<char*>(out.data_ptr());
  const DType type = dtype_of(source);
  const int64_t row_bytes = rows.cols() * size_of(gemm);
  const RowKernels& kernels = row_kernels();
  torch::stable::parallel_for(0, n, row_grain(rows.cols()), [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) {
      const void* row = rows.row(kept.position[static_cast<size_t>(i)]);
      kernels.convert(type, row, compute, gemm, data + i * row_bytes, rows.cols());
    }
  });
  return out;
}

Tensor LinearProblem::tile_of(const Tensor& source, int64_t begin, int64_t columns, DType type,
                              Tensor& scratch) const {
  const Tensor tile = with_dense_rows(narrowed(source, begin, columns));
  if (dtype_of(source) == compute && compute == type) return tile;  // nothing to round or widen
  if (!scratch.defined()) scratch = empty_as(source, {tile_width * source.size(1)}, type);
  const Tensor out = matrix(scratch, columns, source.size(1));
  convert_rows(tile, compute, out);
  return out;
}

VocabTile LinearProblem::operands(int64_t tile) {
  VocabTile t{tile * tile_width, tile_columns(tile), Tensor(), Tensor(), Tensor()};
  t.weight = tile_of(weight_, t.begin, t.n, gemm, weight_scratch_);
  if (lora_weight_) t.lora_weight = tile_of(*lora_weight_, t.begin, t.n, gemm, lora_scratch_);
  if (bias_) {
    const Tensor part = narrowed(*bias_, t.begin, t.n);
    if (!bias_scratch_.defined()) bias_scratch_ = empty_as(part, {tile_width}, result);
    t.bias = narrowed(bias_scratch_, 0, t.n);
    const Tensor dense = torch::stable::contiguous(part);
    row_kernels().convert(dtype_of(part), dense.const_data_ptr(), compute, result,
                          t.bias.data_ptr(), t.n);
  }
  return t;
}

Tensor LinearProblem::logits(const VocabTile& tile, int64_t begin, int64_t rows,
                             const Tensor& scratch) const {
  const Tensor out = matrix(scratch, rows, tile.n);
  mm_out(out, narrowed(x, begin, rows), transposed(tile.weight));
  if (u.defined()) addmm_out(out, narrowed(u, begin, rows), transposed(tile.lora_weight));
  return out;
}

void LinearProblem::add_product(const Tensor& sum, const Tensor& scratch, const Tensor& a,
                                const Tensor& b) const {
  if (!scratch.defined()) return addmm_out(sum, a, b);
  const int64_t rows = sum.size(0), cols = sum.size(1);
  const Tensor product = matrix(scratch, rows, cols);
  mm_out(product, a, b);
  const RowKernels& kernels = row_kernels();
  const Rows to(sum), from(product);
  torch::stable::parallel_for(0, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.scale_add(result, 1.0, to.row(i), 1.0, from.row(i), gemm, cols);
    }
  });
}

void LinearProblem::weight_row_of(const Tensor& weight, int64_t label, void* out) const {
  const DType type = dtype_of(weight);
  const int64_t cols = weight.size(1), item = size_of(type), step = weight.stride(1);
  const char* row =
      static_cast<const char*>(weight.const_data_ptr()) + label * weight.stride(0) * item;
  if (step == 1) return row_kernels().convert(type, row, compute, result, out, cols);
  for (int64_t j = 0; j < cols; ++j) {  // a transposed weight
    char* to = static_cast<char*>(out) + j * size_of(result);
    row_kernels().convert(type, row + j * step * item, compute, result, to, 1);
  }
}

}  // namespace fusedpo
