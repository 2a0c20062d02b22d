// What the CUDA operators share about rows: where they lie, which of them are scored, and their
// results.
#pragma once

#include <cstdlib>

#include "cuda/token_logps.h"
#include "ops/cuda_device.h"
#include "ops/rows.h"

namespace fusedpo {

// Kernels count rows, and the values of a row, in 32 bits; their products in 64.
inline void check_grid(int64_t count) {
  STD_TORCH_CHECK(count <= INT32_MAX, "CUDA tensors may have at most ", INT32_MAX,
                  " rows, and as many values in a row; got ", count);
}

// The rows of t [..., C], whose last dimension is dense; nothing where its leading dimensions do
// not merge into kMaxLeading.
inline std::optional<cuda::RowLayout> row_layout(const Tensor& t) {
  cuda::RowLayout layout;
  layout.dims = 0;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    if (t.size(d) == 1) continue;
    int64_t* const size = layout.size + layout.dims;
    int64_t* const stride = layout.stride + layout.dims;
    if (layout.dims > 0 && stride[-1] == t.size(d) * t.stride(d)) {
      size[-1] *= t.size(d);
      stride[-1] = t.stride(d);
      continue;
    }
    if (layout.dims == cuda::kMaxLeading) return std::nullopt;
    *size = t.size(d);
    *stride = t.stride(d);
    ++layout.dims;
  }
  if (layout.dims == 0) layout.size[layout.dims++] = 1;
  return layout;
}

// The rows of a tensor [..., C], read where they lie unless that needs a copy.
struct DeviceRows {
  explicit DeviceRows(const Tensor& t) : held(with_dense_rows(t)) {
    std::optional<cuda::RowLayout> layout = row_layout(held);
    if (!layout) {
      held = torch::stable::contiguous(held);
      layout = row_layout(held);
    }
    view.data = held.data_ptr();
    view.type = dtype_of(held);
    view.layout = *layout;
    view.cols = held.size(held.dim() - 1);
    view.n = 1;
    for (int64_t d = 0; d + 1 < held.dim(); ++d) view.n *= held.size(d);
    check_grid(view.n);
    check_grid(view.cols);
  }

  Tensor held;
  cuda::RowsView view;
};

// Whether labels outside [0, V) raise, which takes a read of the device, or give NaN.
inline bool checks_labels() {
  const char* wanted = std::getenv("FUSEDPO_CHECK");
  return wanted != nullptr && std::string(wanted) != "" && std::string(wanted) != "0";
}

// The scored positions, found on the device.
class ScoredRows {
 public:
  ScoredRows(const Tensor& labels_in, int64_t vocab, int64_t ignore_index, const CudaDevice& device)
      : labels_(torch::stable::contiguous(labels_in)),
        memory_(torch::stable::new_empty(labels_, {2 * labels_.numel() + 2})),
        vocab_(vocab),
        ignore_index_(ignore_index),
        count_(labels_.numel()) {
    check_grid(count_);
    check_grid(vocab);
    if (count_ == 0) return;
    cuda::find_kept_rows(labels(), count_, vocab, ignore_index, {rows(), slot(), info()},
                         device.stream);
  }

  const int64_t* labels() const { return labels_.const_data_ptr<int64_t>(); }  // by position
  // The i-th scored position, -1 past the last one; and back, -1 where not scored.
  int64_t* rows() const { return memory_.mutable_data_ptr<int64_t>(); }
  int64_t* slot() const { return rows() + count_; }

  // How many; waits for the device.
  int64_t read_count(const CudaDevice& device) const {
    if (count_ == 0) return 0;
    int64_t found[2] = {0, -1};
    cuda::copy_to_host(found, info(), sizeof found, device.stream);
    const int64_t first_bad = found[1];
    if (first_bad >= 0 && checks_labels()) {
      int64_t value = 0;
      cuda::copy_to_host(&value, labels() + first_bad, sizeof value, device.stream);
      throw_label_error(labels_, first_bad, value, vocab_, ignore_index_);
    }
    return found[0];
  }

 private:
  int64_t* info() const { return rows() + 2 * count_; }

  const Tensor labels_, memory_;
  const int64_t vocab_, ignore_index_, count_;
};

// The per-row results both log-prob operators return, shaped like labels; a metric that was not
// asked for is absent. `zero`: positions that no kernel writes must read 0.
struct DeviceResults {
  Tensor logps;
  OptionalTensor entropy, log_sum_sq_probs, mean_logits, is_top1;

  DeviceResults(const Tensor& like, const Tensor& labels, DType type, unsigned metrics, bool zero) {
    const std::vector<int64_t> shape = sizes_of(labels);
    const auto rows = [&](ScalarType t) {
      return zero ? torch::stable::new_zeros(like, shape, t)
                  : torch::stable::new_empty(like, shape, t);
    };
    logps = rows(scalar_type_of(type));
    if (metrics & kEntropy) entropy = rows(scalar_type_of(type));
    if (metrics & kLogSumSqProbs) log_sum_sq_probs = rows(scalar_type_of(type));
    if (metrics & kMeanLogits) mean_logits = rows(scalar_type_of(type));
    if (metrics & kIsTop1) is_top1 = rows(ScalarType::Bool);
  }

  cuda::RowOutputs pointers() const {
    const auto data = [](const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; };
    return {logps.data_ptr(), data(entropy), data(log_sum_sq_probs), data(mean_logits),
            static_cast<bool*>(data(is_top1))};
  }
};

inline const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

}  // namespace fusedpo
