// linear_token_logps on CUDA: the gradients that need the vocabulary again.
//
// With D = d logp / d x [n, V] and c the upstream gradient of logps, by row:
//
//   dW = D^T diag(c) X     dB = D^T diag(c) U     d bias = D^T c
//
// Rows whose D forward kept need no logits: c scales the few columns of X instead of the many of D,
// and one product over all of them sums in fp32. Where that is every row and W is of the compute
// type, the product is rounded once, straight into dW. Other rows form d loss / d x again, chunk by
// chunk: one more GEMM each, and a read and write of [V, H] in fp32 for every chunk after the first
// product. The gradients of the entropy form all of it again: d loss / d x is not a row scale of D.
//
// fp16 has little range: D is stored times unit_scale, and upstream gradients are divided by the
// power of two `largest` that covers them; sums in fp32 get both factors back.
#include "ops/cuda_head.h"

namespace fusedpo {
namespace {

// Device values of the result type, null for 1.
struct Scales {
  Tensor memory, largest, unit;
  const void* of_kept = nullptr;        // 1 / largest: of c, times kept D's unit_scale
  const void* of_recomputed = nullptr;  // unit_scale / largest: of d loss / d x
  const void* back = nullptr;           // largest / unit_scale: what sums of either are times
  const void* of_unit = nullptr;        // 1 / unit_scale: what sums of kept D alone are times

  Scales() = default;
  Scales(const CudaHead& head, const void* c, const void* h) {
    const double unit_scale = cuda::unit_scale(head.compute, head.transform);
    if (head.compute != DType::f16 || head.n == 0) return;
    const auto stream = head.device.stream;
    const DType type = head.result;
    memory = empty_as(head.x, {4}, type);
    const auto at = [&](int64_t i) { return narrowed(memory, i, 1).data_ptr(); };
    cuda::find_gradient_scale(c, h, head.scored.rows(), head.n, type, at(0), stream);
    unit = head.constant(unit_scale);
    largest = head.constant(1.0 / unit_scale);
    cuda::scale_rows(at(1), type, nullptr, nullptr, unit.const_data_ptr(), 1, 1, type, at(2),
                     stream);
    cuda::scale_rows(at(0), type, nullptr, nullptr, largest.const_data_ptr(), 1, 1, type, at(3),
                     stream);
    of_kept = at(1);
    of_recomputed = at(2);
    back = at(3);
    of_unit = largest.const_data_ptr();
  }
};

// dW or dB: out [V, C] from right = X or U.
struct VocabGradient {
  Tensor right;  // [n, C] in the compute type
  Tensor out;    // in its parameter's type
  Tensor sum;    // in the result type, undefined where one product is rounded into out
  bool started = false;
};

class Backward {
 public:
  Backward(CudaHead& head, const OptionalTensor& grad_logps, const OptionalTensor& grad_entropy,
           const OptionalTensor& entropy, const Tensor& stats, const OptionalTensor& kept,
           int64_t stored, int64_t slab)
      : head_(head),
        c_(data_of(grad_logps)),
        h_(data_of(grad_entropy)),
        entropy_(data_of(entropy)),
        stats_(stats),
        kept_(kept),
        stored_(stored),
        slab_(slab),
        scales_(head, c_, h_) {}

  Tensor add_vocab_gradient(const Tensor& right, const Tensor& like) {
    VocabGradient g{right, empty_as(like, sizes_of(like), dtype_of(like)), Tensor()};
    const bool direct =
        stored_ == head_.n && dtype_of(like) == head_.compute && scales_.back == nullptr;
    if (!direct) {
      g.sum = dtype_of(like) == head_.result ? g.out : empty_as(like, sizes_of(like), head_.result);
    }
    vocab_gradients_.push_back(g);
    return g.out;
  }

  Tensor add_bias_gradient(const Tensor& like) {
    bias_out_ = empty_as(like, {head_.vocab}, dtype_of(like));
    bias_sum_ =
        dtype_of(like) == head_.result ? bias_out_ : empty_as(like, {head_.vocab}, head_.result);
    return bias_out_;
  }

  // dX or dU, [n, C] in the result type. Every row is recomputed.
  Tensor add_row_gradient(int64_t cols, bool lora) {
    const Tensor total = empty_as(head_.x, {head_.n, cols}, head_.result);
    (lora ? lora_total_ : hidden_total_) = total;
    return total;
  }

  void run() {
    if (stored_ > 0) add_kept();
    if (stored_ < head_.n) add_recomputed();
    for (const VocabGradient& g : vocab_gradients_) finish(g);
    if (bias_out_.defined()) {
      if (head_.n == 0) torch::stable::zero_(bias_sum_);
      if (bias_sum_.data_ptr() != bias_out_.data_ptr()) copy_to(bias_out_, bias_sum_);
    }
    for (const Tensor& total : {hidden_total_, lora_total_}) {
      if (total.defined() && scales_.back != nullptr) scale(total, scales_.back, total);
    }
  }

 private:
  // to = alpha from, over all rows.
  void scale(const Tensor& from, const void* alpha, const Tensor& to) const {
    cuda::scale_rows(from.const_data_ptr(), head_.result, nullptr, nullptr, alpha, from.size(0),
                     from.size(1), dtype_of(to), to.data_ptr(), head_.device.stream);
  }

  void add_kept() {
    const Tensor d = columns(narrowed(*kept_, 0, stored_), 0, head_.vocab);
    const int64_t* rows = head_.scored.rows();
    for (VocabGradient& g : vocab_gradients_) {
      const int64_t cols = g.right.size(1);
      const Tensor scaled = empty_as(g.right, {stored_, cols}, head_.compute);
      cuda::scale_rows(g.right.const_data_ptr(), head_.compute, c_, rows, scales_.of_kept, stored_,
                       cols, head_.compute, scaled.data_ptr(), head_.device.stream);
      gemm(g.sum.defined() ? g.sum : g.out, transposed(d), scaled);
      g.started = true;
    }
    if (bias_sum_.defined()) {
      cuda::sum_columns(d.const_data_ptr(), head_.compute, head_.ld, c_, rows, scales_.of_unit,
                        stored_, head_.vocab, /*add=*/false, bias_sum_.data_ptr(),
                        head_.device.stream);
    }
  }

  void add_recomputed() {
    const int64_t chunk = head_.chunk_rows(kCostlyChunkBytes);
    const Tensor buffer = head_.logits_buffer(std::min(chunk, head_.n - stored_));
    for (int64_t begin = stored_; begin < head_.n; begin += chunk) {
      const int64_t m = std::min(chunk, head_.n - begin);
      const Tensor d = narrowed(buffer, 0, m);
      const cuda::LogitRows rows = head_.logits(begin, d);
      cuda::gradient_rows(rows, c_, h_, entropy_, narrowed(stats_, begin, m).const_data_ptr(),
                          scales_.of_recomputed, head_.device.stream);
      for (VocabGradient& g : vocab_gradients_) add_product(g, d, narrowed(g.right, begin, m));
      if (bias_sum_.defined()) {
        cuda::sum_columns(d.const_data_ptr(), head_.compute, head_.ld, nullptr, nullptr,
                          scales_.back, m, head_.vocab, /*add=*/begin > 0, bias_sum_.data_ptr(),
                          head_.device.stream);
      }
      head_.times_weights(d, rows_of(hidden_total_, begin, m), rows_of(lora_total_, begin, m));
    }
  }

  static Tensor rows_of(const Tensor& t, int64_t begin, int64_t m) {
    return t.defined() ? narrowed(t, begin, m) : Tensor();
  }

  // g.sum += d^T right. A product of half types meets the sum in fp32: in room of its own, a slab
  // of the vocabulary at a time.
  void add_product(VocabGradient& g, const Tensor& d, const Tensor& right) {
    if (!g.started) {
      gemm(g.sum, transposed(columns(d, 0, head_.vocab)), right);
    } else if (head_.compute == head_.result) {
      add_gemm(g.sum, transposed(columns(d, 0, head_.vocab)), right);
    } else {
      const int64_t cols = right.size(1);
      if (!product_.defined() || product_.numel() < slab_ * cols) {
        product_ = empty_as(right, {slab_ * cols}, head_.result);
      }
      for (int64_t v = 0; v < head_.vocab; v += slab_) {
        const int64_t width = std::min(slab_, head_.vocab - v);
        const Tensor product = matrix(product_, width, cols);
        gemm(product, transposed(columns(d, v, width)), right);
        cuda::add_scaled(narrowed(g.sum, v, width).data_ptr(), product.const_data_ptr(),
                         head_.result, nullptr, width * cols, head_.device.stream);
      }
    }
    g.started = true;
  }

  void finish(const VocabGradient& g) {
    if (!g.started) {  // no row is scored
      Tensor out = g.out;
      torch::stable::zero_(out);
      return;
    }
    if (!g.sum.defined()) return;
    const bool in_place = g.sum.data_ptr() == g.out.data_ptr();
    if (!in_place || scales_.back != nullptr) scale(g.sum, scales_.back, g.out);
  }

  CudaHead& head_;
  const void *const c_, *const h_, *const entropy_;
  const Tensor stats_;
  const OptionalTensor kept_;
  const int64_t stored_;  // scored rows read from kept_
  const int64_t slab_;    // vocabulary entries of one product that needs room of its own
  const Scales scales_;
  std::vector<VocabGradient> vocab_gradients_;
  Tensor bias_sum_, bias_out_, hidden_total_, lora_total_, product_;
};

using Result =
    std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

Result linear_token_logps_backward(const OptionalTensor& grad_logps_in,
                                   const OptionalTensor& grad_entropy_in, const Tensor& hidden,
                                   const Tensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& lora_hidden,
                                   const OptionalTensor& lora_weight, const Tensor& labels,
                                   const OptionalTensor& entropy, const Tensor& stats,
                                   const OptionalTensor& kept, const OptionalTensor& /*anchors*/,
                                   const Tensor& count, int64_t ignore_index, double temperature,
                                   double softcap, double logit_scale, ScalarType compute_dtype,
                                   int64_t vocab_tile, int64_t needs) {
  const CudaDevice device(hidden);
  STD_TORCH_CHECK(count.numel() == 1 && count.scalar_type() == ScalarType::Long && count.is_cpu(),
                  "count is not what forward returned");
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
                device, *count.const_data_ptr<int64_t>());
  check_saved(stats, head.positions, 4, head.result, "stats");
  if (kept) {
    check_saved(*kept, std::min(kept->size(0), head.positions), head.ld, head.compute, "kept");
  }
  const OptionalTensor grad_logps = dense_gradient(grad_logps_in, labels, head.result);
  const OptionalTensor grad_entropy = dense_gradient(grad_entropy_in, labels, head.result);
  check_device(grad_logps, hidden, "grad_logps");
  check_device(grad_entropy, hidden, "grad_entropy");
  STD_TORCH_CHECK(!grad_entropy || entropy, "the entropy's gradient needs the entropy");

  const bool row_gradients = needs & (kHidden | kLoraHidden);
  const int64_t stored =
      kept && !grad_entropy && !row_gradients ? std::min(kept->size(0), head.n) : 0;
  // A product in fp32 takes twice the room of an operand tile, hence half its width.
  Backward backward(head, grad_logps, grad_entropy, entropy, stats, kept, stored,
                    std::clamp<int64_t>(vocab_tile / 2, 1, head.vocab));
  OptionalTensor d_hidden, d_weight, d_bias, d_lora_hidden, d_lora_weight;
  if (needs & kWeight) d_weight = backward.add_vocab_gradient(head.x, weight);
  if (needs & kLoraWeight) d_lora_weight = backward.add_vocab_gradient(head.u, *lora_weight);
  if (needs & kBias) d_bias = backward.add_bias_gradient(*bias);
  Tensor hidden_total, lora_total;
  if (needs & kHidden) hidden_total = backward.add_row_gradient(head.x.size(1), false);
  if (needs & kLoraHidden) lora_total = backward.add_row_gradient(head.u.size(1), true);
  backward.run();
  const auto scattered = [&](const Tensor& total, const Tensor& like) {
    const Tensor out = empty_as(like, sizes_of(like), dtype_of(like));
    if (out.numel() > 0) {
      const DeviceRows to(out);
      cuda::scatter_rows(total.const_data_ptr(), head.result, nullptr, head.scored.slot(), to.view,
                         device.stream);
    }
    return OptionalTensor(out);
  };
  if (needs & kHidden) d_hidden = scattered(hidden_total, hidden);
  if (needs & kLoraHidden) d_lora_hidden = scattered(lora_total, *lora_hidden);
  return {d_hidden, d_weight, d_bias, d_lora_hidden, d_lora_weight};
}

}  // namespace
}  // namespace fusedpo

STABLE_TORCH_LIBRARY_IMPL(fusedpo, FUSEDPO_CUDA_KEY, m) {
  m.impl("linear_token_logps_backward", TORCH_BOX(&fusedpo::linear_token_logps_backward));
}
