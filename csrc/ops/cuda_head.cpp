#include "ops/cuda_head.h"

namespace fusedpo {
namespace {

// Whether a GEMM reads t [V, C] in place: neighbouring values in rows or in columns.
bool is_operand(const Tensor& t, DType compute) {
  const bool by_rows = t.stride(1) == 1 && t.stride(0) >= t.size(1);
  const bool by_columns = t.stride(0) == 1 && t.stride(1) >= t.size(0);
  return dtype_of(t) == compute && (by_rows || by_columns);
}

bool needs_cast(const LinearArguments& a) {
  return !is_operand(a.weight, a.compute) ||
         (a.lora_weight && !is_operand(*a.lora_weight, a.compute));
}

const LinearArguments& checked(const LinearArguments& a) {
  a.check();
  check_device(a.weight, a.hidden, "weight");
  check_device(a.bias, a.hidden, "bias");
  check_device(a.lora_hidden, a.hidden, "lora_hidden");
  check_device(a.lora_weight, a.hidden, "lora_weight");
  return a;
}

}  // namespace

CudaHead::CudaHead(const LinearArguments& arguments, const CudaDevice& on,
                   std::optional<int64_t> known_count)
    : device(on),
      compute(arguments.compute),
      result(result_type(compute)),
      transform(arguments.transform),
      scored(checked(arguments).labels, arguments.weight.size(0), arguments.ignore_index, device),
      positions(arguments.labels.numel()),
      count(known_count ? *known_count
                        : (device.capturing ? kUnknownCount : scored.read_count(device))),
      n(count == kUnknownCount ? positions : count),
      vocab(arguments.weight.size(0)),
      ld(padded_vocab(vocab)),
      tile_width(needs_cast(arguments) ? std::min(arguments.vocab_tile, vocab) : vocab),
      tiles((vocab + tile_width - 1) / tile_width),
      arguments_(arguments),
      casts_(needs_cast(arguments)) {
  x = gather(arguments.hidden);
  if (arguments.lora_hidden) u = gather(*arguments.lora_hidden);
  if (arguments.bias) bias_ = rounded_bias();
  // The logits of half types are rounded; the label's own is formed again in fp32, because its
  // error does not average out as that of a sum over the vocabulary does.
  if (size_of(compute) == 2) exact_ = empty_as(x, {n}, result);
}

int64_t CudaHead::chunk_rows(int64_t bytes) const {
  const int64_t most = std::max(kSmallestChunk, bytes / (ld * size_of(compute)));
  const int64_t chunks = std::max<int64_t>(1, (n + most - 1) / most);
  const int64_t rows = (n + chunks - 1) / chunks;
  return std::min(n, (rows + kChunkStep - 1) / kChunkStep * kChunkStep);
}

Tensor CudaHead::gather(const Tensor& source) const {
  const int64_t cols = source.size(source.dim() - 1);
  // Every position is scored: they are the rows already.
  if (count == positions && dtype_of(source) == compute && source.is_contiguous()) {
    return torch::stable::view(source, {n, cols});
  }
  const Tensor out = empty_as(source, {n, cols}, compute);
  if (n > 0) {
    const DeviceRows from(source);
    cuda::gather_rows(from.view, scored.rows(), n, compute, compute, out.data_ptr(), device.stream);
  }
  return out;
}

Tensor CudaHead::rounded_bias() const {
  const Tensor dense = torch::stable::contiguous(*arguments_.bias);
  if (dtype_of(dense) == compute && compute == result) return dense;
  const Tensor out = empty_as(dense, {vocab}, result);
  const DeviceRows row(torch::stable::view(dense, {1, vocab}));
  cuda::gather_rows(row.view, nullptr, 1, compute, result, out.data_ptr(), device.stream);
  return out;
}

CudaHead::Tile CudaHead::operands(int64_t tile) {
  Tile t{tile * tile_width, std::min(tile_width, vocab - tile * tile_width), Tensor(), Tensor()};
  const auto operand = [&](const Tensor& source, Tensor& scratch) {
    const Tensor part = narrowed(source, t.begin, t.n);
    if (is_operand(source, compute)) return part;
    if (!scratch.defined()) scratch = empty_as(source, {tile_width, source.size(1)}, compute);
    const Tensor cast = narrowed(scratch, 0, t.n);
    if (cast_tile_ != tile) copy_to(cast, part);
    return cast;
  };
  t.weight = operand(arguments_.weight, weight_cast_);
  if (arguments_.lora_weight) t.lora_weight = operand(*arguments_.lora_weight, lora_cast_);
  cast_tile_ = tile;
  return t;
}

cuda::LogitRows CudaHead::logits(int64_t begin, const Tensor& to) {
  const int64_t m = to.size(0);
  const Tensor x_rows = narrowed(x, begin, m);
  const Tensor u_rows = u.defined() ? narrowed(u, begin, m) : Tensor();
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const Tile t = operands(tile);
    const Tensor z = columns(to, t.begin, t.n);
    gemm(z, x_rows, transposed(t.weight));
    if (u.defined()) add_gemm(z, u_rows, transposed(t.lora_weight));
  }
  cuda::LogitRows r;
  r.x = to.data_ptr();
  r.type = compute;
  r.n = m;
  r.ld = ld;
  r.vocab = vocab;
  r.rows = scored.rows() + begin;
  r.labels = scored.labels();
  r.ignore_index = arguments_.ignore_index;
  r.bias = bias_.defined() ? bias_.const_data_ptr() : nullptr;
  r.transform = transform;
  if (exact_.defined()) {
    void* exact = narrowed(exact_, begin, m).data_ptr();
    const auto add_label_products = [&](const Tensor& rows, const Tensor& w, bool add) {
      cuda::label_products(rows.const_data_ptr(), compute, w.const_data_ptr(), dtype_of(w),
                           w.stride(0), w.stride(1), w.size(1), r, add, exact, device.stream);
    };
    add_label_products(x_rows, arguments_.weight, false);
    if (u.defined()) add_label_products(u_rows, *arguments_.lora_weight, true);
    r.exact_targets = exact;
  }
  return r;
}

void CudaHead::add_product(const Tensor& out, const Tensor& d, const Tensor& factor, bool first) {
  if (first) return gemm(out, d, factor);
  if (compute == result) return add_gemm(out, d, factor);
  const int64_t rows = out.size(0), cols = out.size(1);
  if (!product_.defined() || product_.numel() < rows * cols) {
    product_ = empty_as(out, {rows * cols}, result);
  }
  const Tensor product = matrix(product_, rows, cols);
  gemm(product, d, factor);
  cuda::add_scaled(out.data_ptr(), product.const_data_ptr(), result, nullptr, rows * cols,
                   device.stream);
}

// Backwards, because the chunk's logits ended with the last tile, and the next chunk's begin with
// the first: two casts of each chunk are saved.
void CudaHead::times_weights(const Tensor& d, const Tensor& hidden_out, const Tensor& lora_out) {
  if (!hidden_out.defined() && !lora_out.defined()) return;  // no tile is cast for nothing
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const Tile t = operands(tile);
    const Tensor part = columns(d, t.begin, t.n);
    const bool first = tile == tiles - 1;
    if (hidden_out.defined()) add_product(hidden_out, part, t.weight, first);
    if (lora_out.defined()) add_product(lora_out, part, t.lora_weight, first);
  }
}

Tensor CudaHead::constant(double value) const {
  Tensor t = empty_as(x, {1}, result);
  torch::stable::fill_(t, value);
  return t;
}

}  // namespace fusedpo
