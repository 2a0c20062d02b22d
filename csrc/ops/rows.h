// Rows of a tensor [..., C] and the labels that select them.
//
// Leading dimensions may have any strides, so logits[:, :-1] or an expanded tensor is read where it
// lies; only a row's own values must be neighbours.
#pragma once

#include <string>
#include <vector>

#include "ops/stable.h"

namespace fusedpo {

// The rows of a tensor [..., C] whose last dimension is dense.
class Rows {
 public:
  explicit Rows(const Tensor& t)
      : base_(static_cast<char*>(t.data_ptr())), cols_(t.size(t.dim() - 1)) {
    const int64_t leading = t.dim() - 1;
    const int64_t item = size_of(dtype_of(t));
    int64_t count = 1;
    for (int64_t d = 0; d < leading; ++d) count *= t.size(d);
    offsets_.resize(static_cast<size_t>(count));
    for (int64_t row = 0; row < count; ++row) {
      int64_t rest = row, offset = 0;
      for (int64_t d = leading - 1; d >= 0; --d) {
        offset += (rest % t.size(d)) * t.stride(d);
        rest /= t.size(d);
      }
      offsets_[static_cast<size_t>(row)] = offset * item;
    }
  }

  int64_t count() const { return static_cast<int64_t>(offsets_.size()); }
  int64_t cols() const { return cols_; }
  void* row(int64_t i) const { return base_ + offsets_[static_cast<size_t>(i)]; }

 private:
  char* base_;
  int64_t cols_;
  std::vector<int64_t> offsets_;
};

inline Tensor with_dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// The positions that are scored, in order, and their labels.
struct KeptRows {
  std::vector<int64_t> position;  // index into the flattened leading dimensions
  std::vector<int64_t> label;     // in [0, V)

  int64_t count() const { return static_cast<int64_t>(position.size()); }
};

// `value`, at index i of the flattened labels, is neither ignore_index nor in [0, vocab).
[[noreturn]] inline void throw_label_error(const Tensor& labels, int64_t i, int64_t value,
                                           int64_t vocab, int64_t ignore_index) {
  std::string position;
  for (int64_t d = labels.dim() - 1, rest = i; d >= 0; rest /= labels.size(d), --d) {
    position = std::to_string(rest % labels.size(d)) + (position.empty() ? "" : ", ") + position;
  }
  throw std::runtime_error("labels must be in [0, " + std::to_string(vocab) +
                           ") or equal ignore_index (" + std::to_string(ignore_index) + "); got " +
                           std::to_string(value) + " at position (" + position +
                           (labels.dim() == 1 ? ",)" : ")"));
}

// Throws when a label is neither ignore_index nor in [0, vocab): the error names the first one.
inline KeptRows kept_rows(const Tensor& labels_in, int64_t vocab, int64_t ignore_index) {
  const Tensor labels = torch::stable::contiguous(labels_in);
  const int64_t* y = labels.const_data_ptr<int64_t>();
  const int64_t n = labels.numel();
  KeptRows kept;
  for (int64_t i = 0; i < n; ++i) {
    if (y[i] == ignore_index) continue;
    if (y[i] < 0 || y[i] >= vocab) throw_label_error(labels, i, y[i], vocab, ignore_index);
    kept.position.push_back(i);
    kept.label.push_back(y[i]);
  }
  return kept;
}

// The leading dimensions of `rows` must be those of `labels`.
inline void check_rows(const Tensor& rows, const Tensor& labels, const char* name) {
  STD_TORCH_CHECK(rows.dim() == labels.dim() + 1, name,
                  " must have one dimension more than labels");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "labels must be int64");
  check_device(labels, rows, "labels");
  for (int64_t d = 0; d < labels.dim(); ++d) {
    STD_TORCH_CHECK(rows.size(d) == labels.size(d), name, " of shape ", shape_text(sizes_of(rows)),
                    " does not match labels of shape ", shape_text(sizes_of(labels)));
  }
}

// An upstream gradient of `type`, one value per label; may be expanded or strided, and is absent
// when autograd has none.
inline OptionalTensor dense_gradient(const OptionalTensor& grad, const Tensor& labels, DType type) {
  if (!grad) return std::nullopt;
  STD_TORCH_CHECK(dtype_of(*grad) == type && grad->numel() == labels.numel(),
                  "an upstream gradient must be shaped like labels ", shape_text(sizes_of(labels)),
                  " and have the dtype of the log-probs");
  return torch::stable::contiguous(*grad);
}

// What forward saved for backward.
inline void check_saved(const Tensor& t, int64_t rows, int64_t cols, DType type, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols && dtype_of(t) == type &&
                      t.is_contiguous(),
                  name, " is not what forward returned");
}

}  // namespace fusedpo
