// token_logps on CUDA: one launch forward, one backward; nothing waits for the device. Unlike the
// CPU's, stats are by position: which positions are scored is known on the device only.
#include "ops/cuda_rows.h"

namespace fusedpo {
namespace {

// [logps, entropy, log_sum_sq_probs, mean_logits, is_top1, stats]
using Result =
    std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, Tensor>;

Result token_logps(const Tensor& logits, const Tensor& labels_in, int64_t ignore_index,
                   double temperature, int64_t metric_bits, bool /*inplace_backward*/) {
  check_rows(logits, labels_in, "logits");
  const CudaDevice device(logits);
  const DeviceRows rows(logits);
  const Tensor labels = torch::stable::contiguous(labels_in);
  const DType type = result_type(rows.view.type);
  const unsigned metrics = static_cast<unsigned>(metric_bits);
  const DeviceResults out(logits, labels, type, metrics, /*zero=*/false);
  const Tensor stats = empty_as(logits, {rows.view.n, 3}, type);
  if (rows.view.n > 0) {
    if (checks_labels() && !device.capturing) {
      ScoredRows(labels, rows.view.cols, ignore_index, device).read_count(device);
    }
    cuda::token_logps(rows.view, labels.const_data_ptr<int64_t>(), ignore_index, temperature,
                      metrics, out.pointers(), stats.data_ptr(), device.stream);
  }
  return {out.logps, out.entropy, out.log_sum_sq_probs, out.mean_logits, out.is_top1, stats};
}

// Row t of out = d loss / d logits row t; out may be logits.
void write_gradient(const OptionalTensor& grad_logps_in, const OptionalTensor& grad_entropy_in,
                    const Tensor& logits, const Tensor& labels_in, const OptionalTensor& entropy,
                    const Tensor& stats, int64_t ignore_index, double temperature,
                    const Tensor& out) {
  check_rows(logits, labels_in, "logits");
  const CudaDevice device(logits);
  const DeviceRows rows(logits), out_rows(out);
  const DType type = result_type(rows.view.type);
  check_saved(stats, rows.view.n, 3, type, "stats");
  const Tensor labels = torch::stable::contiguous(labels_in);
  const OptionalTensor grad_logps = dense_gradient(grad_logps_in, labels, type);
  const OptionalTensor grad_entropy =
      entropy ? dense_gradient(grad_entropy_in, labels, type) : std::nullopt;
  check_device(grad_logps, logits, "grad_logps");
  check_device(grad_entropy, logits, "grad_entropy");
  if (rows.view.n > 0) {
    cuda::token_logps_backward(rows.view, labels.const_data_ptr<int64_t>(), ignore_index,
                               temperature, data_of(grad_logps), data_of(grad_entropy),
                               data_of(entropy), stats.const_data_ptr(), out_rows.view,
                               device.stream);
  }
  // More leading dimensions than a layout holds: the gradient went into a copy.
  if (out_rows.held.const_data_ptr() != out.const_data_ptr()) copy_to(out, out_rows.held);
}

Tensor token_logps_backward(const OptionalTensor& grad_logps, const OptionalTensor& grad_entropy,
                            const Tensor& logits, const Tensor& labels,
                            const OptionalTensor& entropy, const Tensor& stats,
                            int64_t ignore_index, double temperature) {
  const Tensor out = empty_as(logits, sizes_of(logits), dtype_of(logits));
  write_gradient(grad_logps, grad_entropy, logits, labels, entropy, stats, ignore_index,
                 temperature, out);
  return out;
}

void token_logps_backward_(const OptionalTensor& grad_logps, const OptionalTensor& grad_entropy,
                           Tensor logits, const Tensor& labels, const OptionalTensor& entropy,
                           const Tensor& stats, int64_t ignore_index, double temperature) {
  STD_TORCH_CHECK(logits.size(logits.dim() - 1) <= 1 || logits.stride(logits.dim() - 1) == 1,
                  "inplace_backward needs logits whose last dimension is contiguous");
  write_gradient(grad_logps, grad_entropy, logits, labels, entropy, stats, ignore_index,
                 temperature, logits);
}

}  // namespace
}  // namespace fusedpo

STABLE_TORCH_LIBRARY_IMPL(fusedpo, FUSEDPO_CUDA_KEY, m) {
  m.impl("token_logps", TORCH_BOX(&fusedpo::token_logps));
  m.impl("token_logps_backward", TORCH_BOX(&fusedpo::token_logps_backward));
  m.impl("token_logps_backward_", TORCH_BOX(&fusedpo::token_logps_backward_));
}
