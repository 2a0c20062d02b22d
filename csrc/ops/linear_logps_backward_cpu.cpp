// linear_token_logps on CPU: the gradients that need the vocabulary again.
//
// With D = d loss / d x [n, V] and c, h the upstream gradients of logps and entropy:
//
//   dW = D^T X     dB = D^T U     d bias = D^T 1     dX = D W     dU = D B
//
// Rows whose e = exp(x - anchor) was kept need no logits: off the label D = diag(f) e with
// f = -c k exp(anchor - max) / s, so f scales the few columns of X instead of the many of e, and
// the label's entry, c k (1 - p_y), is added to the one row of dW it belongs to. Other rows form D
// from their logits again: one more GEMM. Sums over rows run in the result type, in one GEMM per
// tile over all kept rows.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops/large.h"
#include "ops/linear_problem.h"

namespace fusedpo {
namespace {

// dW, dB or d bias: out [V, C] += D^T right, right [n, C].
struct VocabGradient {
  Tensor right;       // X, U or ones, in the result type
  Tensor out;         // in its parameter's type
  bool in_gemm_type;  // one GEMM in the GEMM's own type, rounded once, straight into out
  Tensor scratch_right, scratch_tile;
  bool started = false;  // this tile of out holds something
};

class Backward {
 public:
  Backward(LinearProblem& problem, const OptionalTensor& grad_logps,
           const OptionalTensor& grad_entropy, const OptionalTensor& entropy, const Tensor& stats,
           const OptionalTensor& kept, const OptionalTensor& anchors)
      : p_(problem),
        k_(problem.transform.scale / problem.transform.temperature),
        kept_(kept),
        anchors_(anchors),
        stored_(kept && !grad_entropy ? std::min(kept->size(0), p_.n) : 0),
        kept_stride_(kept ? std::min(kept->size(0), p_.n) : 0) {
    rows_.resize(static_cast<size_t>(p_.n));
    slopes_.resize(static_cast<size_t>(p_.n));
    const void* c = grad_logps ? grad_logps->const_data_ptr() : nullptr;
    const void* h = grad_entropy ? grad_entropy->const_data_ptr() : nullptr;
    const void* e = entropy ? entropy->const_data_ptr() : nullptr;
    const void* s = stats.const_data_ptr();
    for (int64_t i = 0; i < p_.n; ++i) {
      const int64_t t = p_.kept.position[static_cast<size_t>(i)];
      RowGradient& row = rows_[static_cast<size_t>(i)];
      row.max = value_at(s, p_.result, 4 * i);
      row.log_sum = value_at(s, p_.result, 4 * i + 1);
      row.rest_share = value_at(s, p_.result, 4 * i + 2);
      row.grad_logp = c == nullptr ? 0.0 : value_at(c, p_.result, t);
      row.grad_entropy = h == nullptr ? 0.0 : value_at(h, p_.result, t);
      row.entropy = e == nullptr ? 0.0 : value_at(e, p_.result, t);
      slopes_[static_cast<size_t>(i)] = value_at(s, p_.result, 4 * i + 3);
    }
    by_label_.resize(static_cast<size_t>(stored_));
    std::iota(by_label_.begin(), by_label_.end(), int64_t{0});
    std::stable_sort(by_label_.begin(), by_label_.end(), [&](int64_t a, int64_t b) {
      return p_.kept.label[static_cast<size_t>(a)] < p_.kept.label[static_cast<size_t>(b)];
    });
  }

  // A gradient on the vocabulary's side; its tiles of out are complete once run() returns.
  void add_vocab_gradient(const Tensor& right, const Tensor& out) {
    // A bf16 GEMM sums in fp32, so where one product holds every row and out is bf16 anyway,
    // nothing is lost. Several products must meet in fp32 first.
    const bool in_gemm_type = dtype_of(out) == p_.gemm && p_.gemm == p_.compute && stored_ == p_.n;
    const DType right_type = in_gemm_type ? p_.gemm : p_.result;
    VocabGradient g{right, out, in_gemm_type, Tensor(), Tensor(), false};
    g.scratch_right = empty_as(right, {p_.n * right.size(1)}, right_type);
    if (!in_gemm_type && dtype_of(out) != p_.result) {
      g.scratch_tile = empty_as(right, {p_.tile_width * right.size(1)}, p_.result);
    }
    vocab_gradients_.push_back(std::move(g));
  }

  // A gradient on the rows' side, [n, C] in the result type, of X (or of U with lora).
  void add_row_gradient(const Tensor& total, bool lora) {
    (lora ? lora_total_ : hidden_total_) = total;
    (lora ? lora_product_ : hidden_product_) = p_.product_scratch(total.size(1));
  }

  void run() {
    const bool recomputes = stored_ < p_.n;
    if (recomputes) {
      z_ = empty_as(p_.x, {p_.block * p_.tile_width}, p_.gemm);
      if (p_.gemm != p_.result) d_ = empty_as(p_.x, {p_.block * p_.tile_width}, p_.result);
    }
    bool widens = false;
    for (const VocabGradient& g : vocab_gradients_) widens |= !g.in_gemm_type;
    if (stored_ > 0 && p_.compute != p_.result && widens) {
      e_ = empty_as(p_.x, {p_.block * p_.tile_width}, p_.result);
    }
    for (int64_t tile = 0; tile < p_.tiles; ++tile) {
      begin_ = tile * p_.tile_width;
      columns_ = p_.tile_columns(tile);
      for (VocabGradient& g : vocab_gradients_) g.started = false;
      if (stored_ > 0) add_kept(tile);
      if (recomputes) add_recomputed(p_.operands(tile));
      for (VocabGradient& g : vocab_gradients_) {
        if (!g.started) zero(tile_out(g));  // no row is scored
        if (g.scratch_tile.defined()) {
          convert_rows(tile_out(g), p_.result, narrowed(g.out, begin_, columns_));
        }
      }
    }
  }

 private:
  Tensor tile_out(const VocabGradient& g) const {
    if (g.scratch_tile.defined()) return matrix(g.scratch_tile, columns_, g.right.size(1));
    return narrowed(g.out, begin_, columns_);
  }

  static void zero(Tensor t) { torch::stable::zero_(t); }

  // This tile of out += d^T right.
  void add_to(VocabGradient& g, const Tensor& d, const Tensor& right) const {
    if (g.started) {
      addmm_out(tile_out(g), transposed(d), right);
    } else {
      mm_out(tile_out(g), transposed(d), right);
    }
    g.started = true;
  }

  void add_kept(int64_t tile) {
    Tensor e = torch::stable::view(*kept_, {kept_->numel()});
    e = narrowed(e, kept_stride_ * begin_, stored_ * columns_);
    e = torch::stable::view(e, {stored_, columns_});
    // Widened block by block, or all rows in one product.
    const int64_t step = e_.defined() ? p_.block : stored_;
    for (int64_t begin = 0; begin < stored_; begin += step) {
      const int64_t rows = std::min(step, stored_ - begin);
      const Tensor part = narrowed(e, begin, rows);
      Tensor wide = part;
      if (e_.defined()) {
        wide = matrix(e_, rows, columns_);
        convert_rows(part, p_.result, wide);
      }
      for (VocabGradient& g : vocab_gradients_) {
        add_to(g, g.in_gemm_type ? part : wide, scaled_right(g, tile, begin, rows));
      }
    }
    for (const VocabGradient& g : vocab_gradients_) add_labels(g);
  }

  // diag(f) right for rows [begin, begin + rows) of a tile.
  Tensor scaled_right(const VocabGradient& g, int64_t tile, int64_t begin, int64_t rows) const {
    const int64_t cols = g.right.size(1);
    const Tensor scaled = matrix(g.scratch_right, rows, cols);
    const DType type = dtype_of(scaled);
    const Rows from(g.right), to(scaled);
    const void* anchors = anchors_->const_data_ptr();
    const RowKernels& kernels = row_kernels();
    torch::stable::parallel_for(0, rows, row_grain(cols), [&](int64_t a, int64_t b) {
      for (int64_t r = a; r < b; ++r) {
        const int64_t i = begin + r;
        const RowGradient& row = rows_[static_cast<size_t>(i)];
        const double anchor = value_at(anchors, p_.result, i * p_.tiles + tile);
        // A tile of masked logits only has no anchor and no mass.
        const double share = anchor == -INFINITY ? 0.0 : std::exp(anchor - row.max - row.log_sum);
        kernels.scale(p_.result, -row.grad_logp * k_ * share, from.row(i), to.row(r), type, cols);
      }
    });
    return scaled;
  }

  // The labels' entries of D, each times its row of `right`, to this tile of out. All rows of one
  // label are summed before the sum is rounded to out's type.
  void add_labels(const VocabGradient& g) const {
    const RowKernels& kernels = row_kernels();
    const Tensor tile = tile_out(g);
    const DType type = dtype_of(tile);
    const Rows out(tile), from(g.right);
    const auto label_of = [&](int64_t i) { return p_.kept.label[static_cast<size_t>(i)]; };
    auto i = std::lower_bound(by_label_.begin(), by_label_.end(), begin_,
                              [&](int64_t row, int64_t label) { return label_of(row) < label; });
    std::vector<double> sum(static_cast<size_t>(out.cols()));  // a row in fp32 or fp64
    while (i != by_label_.end() && label_of(*i) < begin_ + columns_) {
      const int64_t label = label_of(*i);
      void* row_out = out.row(label - begin_);
      kernels.convert(type, row_out, p_.result, p_.result, sum.data(), out.cols());
      for (; i != by_label_.end() && label_of(*i) == label; ++i) {
        const RowGradient& row = rows_[static_cast<size_t>(*i)];
        const double d = row.grad_logp * k_ * row.rest_share * slopes_[static_cast<size_t>(*i)];
        kernels.scale_add(p_.result, 1.0, sum.data(), d, from.row(*i), p_.result, out.cols());
      }
      kernels.convert(p_.result, sum.data(), p_.result, type, row_out, out.cols());
    }
  }

  void add_recomputed(const VocabTile& tile) {
    const RowKernels& kernels = row_kernels();
    for (int64_t begin = stored_; begin < p_.n; begin += p_.block) {
      const int64_t rows = std::min(p_.block, p_.n - begin);
      const Tensor z = p_.logits(tile, begin, rows, z_);
      const Tensor d = d_.defined() ? matrix(d_, rows, columns_) : z;
      const Rows z_rows(z), d_rows(d);
      torch::stable::parallel_for(0, rows, row_grain(columns_), [&](int64_t a, int64_t b) {
        for (int64_t r = a; r < b; ++r) {
          const int64_t i = begin + r;
          const Segment segment{z_rows.row(r), p_.gemm, tile.bias_data(), columns_,
                                p_.kept.label[static_cast<size_t>(i)] - begin_};
          kernels.gradient(p_.result, segment, p_.transform, rows_[static_cast<size_t>(i)],
                           d_rows.row(r), p_.result);
          // The GEMM with W takes D in its own type.
          if (d_.defined()) {
            kernels.convert(p_.result, d_rows.row(r), p_.gemm, p_.gemm, z_rows.row(r), columns_);
          }
        }
      });
      for (VocabGradient& g : vocab_gradients_) {
        add_to(g, d, narrowed(g.right, begin, rows));
      }
      if (hidden_total_.defined()) {
        p_.add_product(narrowed(hidden_total_, begin, rows), hidden_product_, z, tile.weight);
      }
      if (lora_total_.defined()) {
        p_.add_product(narrowed(lora_total_, begin, rows), lora_product_, z, tile.lora_weight);
      }
    }
  }

  LinearProblem& p_;
  const double k_;
  const OptionalTensor kept_, anchors_;
  const int64_t stored_;       // scored rows read from kept_
  const int64_t kept_stride_;  // rows of one of kept_'s tiles
  std::vector<RowGradient> rows_;
  std::vector<double> slopes_;     // 1 - tanh^2 at the label
  std::vector<int64_t> by_label_;  // the stored rows in the order of their labels
  std::vector<VocabGradient> vocab_gradients_;
  Tensor hidden_total_, lora_total_, hidden_product_, lora_product_;
  Tensor z_, d_, e_;
  int64_t begin_ = 0, columns_ = 0;
};

// Rows of `total` at their positions in a tensor shaped like `like`, zero elsewhere.
Tensor scatter(const LinearProblem& p, const Tensor& total, const Tensor& like) {
  const Tensor out = zeros_as(like, sizes_of(like), dtype_of(like));
  const Rows from(total), to(out);
  for (int64_t i = 0; i < p.n; ++i) {
    row_kernels().convert(p.result, from.row(i), p.result, dtype_of(like),
                          to.row(p.kept.position[static_cast<size_t>(i)]), to.cols());
  }
  return out;
}

using Result =
    std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

Result linear_token_logps_backward(
    const OptionalTensor& grad_logps, const OptionalTensor& grad_entropy, const Tensor& hidden,
    const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& lora_hidden,
    const OptionalTensor& lora_weight, const Tensor& labels, const OptionalTensor& entropy,
    const Tensor& stats, const OptionalTensor& kept, const OptionalTensor& anchors,
    const Tensor& /*count*/, int64_t ignore_index, double temperature, double softcap,
    double logit_scale, ScalarType compute_dtype, int64_t vocab_tile, int64_t needs) {
  LinearProblem p({hidden,
                   weight,
                   bias,
                   lora_hidden,
                   lora_weight,
                   labels,
                   ignore_index,
                   {logit_scale, softcap, temperature},
                   dtype_of(compute_dtype),
                   vocab_tile});
  const int64_t n = labels.numel();
  check_saved(stats, n, 4, p.result, "stats");
  if (kept) {
    check_saved(*kept, std::min(kept->size(0), n), p.vocab, p.compute, "kept");
    check_saved(anchors.value(), kept->size(0), p.tiles, p.result, "anchors");
  }
  Backward backward(p, dense_gradient(grad_logps, labels, p.result),
                    dense_gradient(grad_entropy, labels, p.result), entropy, stats, kept, anchors);
  OptionalTensor d_hidden, d_weight, d_bias, d_lora_hidden, d_lora_weight;
  const auto vocab_gradient = [&](const Tensor& right_in, const Tensor& like) {
    Tensor right = right_in;
    if (dtype_of(right) != p.result) {
      right = empty_as(right_in, sizes_of(right_in), p.result);
      convert_rows(right_in, p.result, right);
    }
    const Tensor out = empty_large(like, sizes_of(like), dtype_of(like));
    const std::vector<int64_t> as_matrix{like.size(0), right.size(1)};
    backward.add_vocab_gradient(right, torch::stable::view(out, as_matrix));
    return OptionalTensor(out);
  };
  if (needs & kWeight) d_weight = vocab_gradient(p.x, weight);
  if (needs & kLoraWeight) d_lora_weight = vocab_gradient(p.u, *lora_weight);
  if (needs & kBias) {
    Tensor ones = empty_as(p.x, {p.n, 1}, p.result);
    torch::stable::fill_(ones, 1.0);
    d_bias = vocab_gradient(ones, *bias);
  }
  Tensor hidden_total, lora_total;
  if (needs & kHidden) {
    hidden_total = zeros_as(p.x, {p.n, p.x.size(1)}, p.result);
    backward.add_row_gradient(hidden_total, false);
  }
  if (needs & kLoraHidden) {
    lora_total = zeros_as(p.x, {p.n, p.u.size(1)}, p.result);
    backward.add_row_gradient(lora_total, true);
  }
  backward.run();
  if (needs & kHidden) d_hidden = scatter(p, hidden_total, hidden);
  if (needs & kLoraHidden) d_lora_hidden = scatter(p, lora_total, *lora_hidden);
  return {d_hidden, d_weight, d_bias, d_lora_hidden, d_lora_weight};
}

}  // namespace
}  // namespace fusedpo

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  m.impl("linear_token_logps_backward", TORCH_BOX(&fusedpo::linear_token_logps_backward));
}
