// linear_token_logps on CUDA, forward. Chunks of scored rows times the whole vocabulary:
//
//   x = X_c W^T             a GEMM into the chunk [m, V] in the compute type
//   x -> logps, metrics, D  one kernel, D = d logp / d x in x's place
//   G = D W                 a GEMM with an fp32 result: d logp / d hidden, whatever the loss is
//
// Rows whose D is kept for the weight's gradient get their logits straight in `kept`. The chunks
// are the same whether a gradient is wanted or not, so logps have the same bits. The only time the
// host waits is for the number of scored rows; under graph capture it does not, and empty rows
// follow the scored ones through all products.
#include "ops/cuda_head.h"

namespace fusedpo {
namespace {

// [logps, entropy, log_sum_sq_probs, mean_logits, is_top1, stats, unit_grad, lora_unit_grad, kept,
// anchors, count]
using Result =
    std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, Tensor,
               OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, Tensor>;

// d logp / d hidden (or lora_hidden) [positions, C] of which the first n rows are filled.
Tensor unit_gradient(const CudaHead& head, int64_t cols) {
  const Tensor unit = empty_as(head.x, {head.positions, cols}, head.result);
  Tensor rest = narrowed(unit, head.n, head.positions - head.n);
  if (rest.numel() > 0) torch::stable::zero_(rest);
  return unit;
}

Tensor rows_of(const OptionalTensor& t, int64_t begin, int64_t m) {
  return t ? narrowed(*t, begin, m) : Tensor();
}

Result linear_token_logps(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& lora_hidden, const OptionalTensor& lora_weight,
                          const Tensor& labels, int64_t ignore_index, double temperature,
                          double softcap, double logit_scale, int64_t metric_bits,
                          ScalarType compute_dtype, int64_t vocab_tile, int64_t want_grads,
                          int64_t keep_rows_at_most) {
  const CudaDevice device(hidden);
  CudaHead head({hidden,
                 weight,
                 bias,
                 lora_hidden,
                 lora_weight,
                 labels,
                 ignore_index,
                 {logit_scale, softcap, temperature},
                 dtype_of(compute_dtype),
                 vocab_tile},
                device, std::nullopt);
  const unsigned metrics = static_cast<unsigned>(metric_bits);
  const int64_t keep_rows = std::min(keep_rows_at_most, head.positions);
  const int64_t stored = std::min(keep_rows, head.n);

  const DeviceResults out(hidden, labels, head.result, metrics, /*zero=*/true);
  const Tensor stats = zeros_as(hidden, {head.positions, 4}, head.result);
  OptionalTensor unit, lora_unit, kept;
  if (want_grads & kHidden) unit = unit_gradient(head, head.x.size(1));
  if ((want_grads & kLoraHidden) && lora_weight) {
    lora_unit = unit_gradient(head, lora_weight->size(1));
  }
  if (keep_rows_at_most > 0) {
    kept = empty_as(hidden, {keep_rows, head.ld}, head.compute);
    Tensor padding = columns(*kept, head.vocab, head.ld - head.vocab);
    if (padding.numel() > 0) torch::stable::zero_(padding);
  }

  const int64_t chunk = head.chunk_rows(head.casts() ? kCostlyChunkBytes : kChunkBytes);
  Tensor scratch;
  for (int64_t begin = 0; begin < head.n; begin += chunk) {
    const int64_t m = std::min(chunk, head.n - begin);
    const int64_t to_keep = std::clamp<int64_t>(stored - begin, 0, m);
    if (to_keep < m && !scratch.defined()) scratch = head.logits_buffer(chunk);
    const Tensor d = to_keep == m ? narrowed(*kept, begin, m) : narrowed(scratch, 0, m);
    const cuda::LogitRows rows = head.logits(begin, d);
    cuda::score_rows(rows, metrics, unit || lora_unit || to_keep > 0, out.pointers(),
                     narrowed(stats, begin, m).data_ptr(), device.stream);
    if (to_keep > 0 && to_keep < m) {
      copy_to(narrowed(*kept, begin, to_keep), narrowed(d, 0, to_keep));
    }
    head.times_weights(d, rows_of(unit, begin, m), rows_of(lora_unit, begin, m));
  }
  const double unit_scale = cuda::unit_scale(head.compute, head.transform);
  if (unit_scale != 1.0 && head.n > 0) {
    const Tensor alpha = head.constant(1.0 / unit_scale);
    for (const OptionalTensor& g : {unit, lora_unit}) {
      if (!g) continue;
      cuda::scale_rows(g->const_data_ptr(), head.result, nullptr, nullptr, alpha.const_data_ptr(),
                       head.n, g->size(1), head.result, g->data_ptr(), device.stream);
    }
  }
  const Tensor count = empty_cpu({1}, aoti_torch_dtype_int64());
  *count.mutable_data_ptr<int64_t>() = head.count;
  return {out.logps,
          out.entropy,
          out.log_sum_sq_probs,
          out.mean_logits,
          out.is_top1,
          stats,
          unit,
          lora_unit,
          kept,
          std::nullopt,
          count};
}

Tensor linear_token_logps_backward_hidden(const Tensor& grad_logps_in, const Tensor& unit_grad,
                                          const Tensor& labels, int64_t ignore_index,
                                          ScalarType dtype) {
  const CudaDevice device(unit_grad);
  const DType result = dtype_of(unit_grad);
  const int64_t cols = unit_grad.size(1);
  check_saved(unit_grad, labels.numel(), cols, result, "unit_grad");
  check_device(grad_logps_in, unit_grad, "grad_logps");
  check_device(labels, unit_grad, "labels");
  const Tensor grad_logps = *dense_gradient(grad_logps_in, labels, result);
  std::vector<int64_t> shape = sizes_of(labels);
  shape.push_back(cols);
  const Tensor out = empty_as(unit_grad, shape, dtype_of(dtype));
  if (out.numel() == 0) return out;
  // Any vocabulary: labels outside it are scored, and were so in forward.
  const ScoredRows scored(labels, INT32_MAX, ignore_index, device);
  const DeviceRows to(out);
  cuda::scatter_rows(unit_grad.const_data_ptr(), result, grad_logps.const_data_ptr(), scored.slot(),
                     to.view, device.stream);
  return out;
}

}  // namespace
}  // namespace fusedpo

STABLE_TORCH_LIBRARY_IMPL(fusedpo, FUSEDPO_CUDA_KEY, m) {
  m.impl("linear_token_logps", TORCH_BOX(&fusedpo::linear_token_logps));
  m.impl("linear_token_logps_backward_hidden",
         TORCH_BOX(&fusedpo::linear_token_logps_backward_hidden));
}
