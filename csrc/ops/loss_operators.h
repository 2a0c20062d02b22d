// The operators of the loss family, on every device: checks, allocation and the call of the
// kernels. Forward forms every derivative, so backward reads no log-prob again.
//
// Device is what differs (loss_cpu.cpp, loss_cuda.cpp):
//
//   Device(like)               makes the device of `like` the current one while it lives
//   empty(sizes, type)         a new tensor on it
//   check_order(order, count)  refuses an order that forward cannot have returned
//   evaluate_pairs, evaluate_unpaired, scale_gradients
//                              the kernels
#pragma once

#include <string>

#include "core/loss_batch.h"
#include "ops/stable.h"

namespace fusedpo {

inline int32_t code_of(ScalarType type) {
  if (type == ScalarType::Long) return aoti_torch_dtype_int64();
  return type == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

enum Reduction : int64_t { kMean = 0, kSum = 1 };

// The mean of no pair is 0, not NaN: an empty batch must not spoil an accumulated loss.
inline double scale_of(int64_t reduction, int64_t count) {
  return reduction == kMean && count > 0 ? 1.0 / static_cast<double>(count) : 1.0;
}

inline void check_pairs(const Tensor& t, const Tensor& like, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == like.size(0) && t.scalar_type() == type, name,
                  " must have the length ", like.size(0),
                  " and the dtype that the other arguments ask for");
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// An optional input, checked and dense; null data when it is absent.
class Input {
 public:
  Input(const OptionalTensor& t, const Tensor& like, ScalarType type, const char* name) {
    if (!t) return;
    check_pairs(*t, like, type, name);
    check_device(t, like, name);
    held_ = dense(*t);
  }
  template <typename T>
  const T* data() const {
    return held_ ? held_->const_data_ptr<T>() : nullptr;
  }

 private:
  OptionalTensor held_;
};

// [loss, losses, chosen_rewards, rejected_rewards, margins, accuracies, gradients, order]
using PairResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor>;

template <typename T, typename Device>
PairResult evaluate(const Device& device, const std::vector<LossItem>& items,
                    const PairOptions& options, const PairBatch<T>& batch, const Tensor& like,
                    int64_t reduction, unsigned needs) {
  const ScalarType type = like.scalar_type();
  const int64_t sorted =
      count_bits(ListTraits(items.data(), static_cast<int>(items.size())).sorted);
  const int64_t rows = count_bits(needs) + ((needs & kNeedLogps) != 0 ? sorted : 0);
  Tensor loss = device.empty({}, type), losses = device.empty({batch.count}, type);
  Tensor chosen = device.empty({batch.count}, type), rejected = device.empty({batch.count}, type);
  Tensor margins = device.empty({batch.count}, type);
  Tensor accuracies = device.empty({batch.count}, type);
  OptionalTensor gradients, order;
  PairResults<T> out;
  if (needs != 0) {
    gradients = device.empty({rows, batch.count}, type);
    out.gradients = gradients->mutable_data_ptr<T>();
  }
  OptionalTensor unsaved;  // without a gradient the order is needed here only
  if (sorted != 0) {
    OptionalTensor& held = (needs & kNeedLogps) != 0 ? order : unsaved;
    held = device.empty({2 * sorted, batch.count}, ScalarType::Long);
    out.order = held->mutable_data_ptr<int64_t>();
  }
  out.total = loss.mutable_data_ptr<T>();
  out.losses = losses.mutable_data_ptr<T>();
  out.chosen_rewards = chosen.mutable_data_ptr<T>();
  out.rejected_rewards = rejected.mutable_data_ptr<T>();
  out.margins = margins.mutable_data_ptr<T>();
  out.accuracies = accuracies.mutable_data_ptr<T>();
  device.evaluate_pairs(items, options, batch, scale_of(reduction, batch.count), needs, out);
  return {loss, losses, chosen, rejected, margins, accuracies, gradients, order};
}

inline std::vector<LossItem> loss_items(const std::vector<int64_t>& losses,
                                        const std::vector<double>& weights,
                                        const std::vector<double>& nll_weights) {
  STD_TORCH_CHECK(
      !losses.empty() && weights.size() == losses.size() && nll_weights.size() == losses.size(),
      "losses, weights and nll_weights must have the same length, at least 1");
  std::vector<LossItem> items;
  for (size_t i = 0; i < losses.size(); ++i) {
    STD_TORCH_CHECK(losses[i] >= 0 && losses[i] < static_cast<int64_t>(PairLoss::kCount),
                    "losses must hold codes of paired losses; got ", losses[i]);
    items.push_back({static_cast<PairLoss>(losses[i]), weights[i], nll_weights[i]});
  }
  return items;
}

template <typename Device>
PairResult preference_loss(const Tensor& chosen, const Tensor& rejected,
                           const OptionalTensor& ref_chosen, const OptionalTensor& ref_rejected,
                           const OptionalTensor& chosen_lengths,
                           const OptionalTensor& rejected_lengths, const OptionalTensor& chosen_nll,
                           const OptionalTensor& pair_weights, std::vector<int64_t> losses,
                           std::vector<double> weights, std::vector<double> nll_weights,
                           double beta, double label_smoothing, int64_t f_divergence,
                           double f_alpha, double discopop_tau, double simpo_gamma, double alpha,
                           int64_t reduction, int64_t needs) {
  const ScalarType type = chosen.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "chosen_logps must be float32 or float64");
  STD_TORCH_CHECK(f_divergence >= 0 && f_divergence <= static_cast<int64_t>(FDivergence::kAlpha),
                  "f_divergence must be in [0, 3]; got ", f_divergence);
  const std::vector<LossItem> items = loss_items(losses, weights, nll_weights);
  for (const LossItem& item : items) {
    STD_TORCH_CHECK(!has_reference(item.loss) || (ref_chosen && ref_rejected),
                    "the named losses need ref_chosen_logps and ref_rejected_logps");
    STD_TORCH_CHECK(!uses_lengths(item.loss) || (chosen_lengths && rejected_lengths),
                    "the named losses need chosen_lengths and rejected_lengths");
    STD_TORCH_CHECK(item.nll_weight == 0.0 || chosen_nll, "the named losses need chosen_nll");
    STD_TORCH_CHECK(!sorts_batch(item.loss) || !pair_weights,
                    "pair_weights cannot be used with losses that sort the batch");
  }
  const Device device(chosen);
  const bool one_nll = chosen_nll && chosen_nll->dim() == 0;
  STD_TORCH_CHECK(!one_nll || chosen_nll->scalar_type() == type,
                  "chosen_nll must have the dtype of chosen_logps");
  check_device(chosen_nll, chosen, "chosen_nll");
  const PairOptions options{beta,    label_smoothing, static_cast<FDivergence>(f_divergence),
                            f_alpha, discopop_tau,    simpo_gamma,
                            alpha};
  check_pairs(chosen, chosen, type, "chosen_logps");
  const Input c(chosen, chosen, type, "chosen_logps"), r(rejected, chosen, type, "rejected_logps");
  const Input rc(ref_chosen, chosen, type, "ref_chosen_logps");
  const Input rr(ref_rejected, chosen, type, "ref_rejected_logps");
  const Input cl(chosen_lengths, chosen, ScalarType::Long, "chosen_lengths");
  const Input rl(rejected_lengths, chosen, ScalarType::Long, "rejected_lengths");
  const Input nll(one_nll ? std::nullopt : chosen_nll, chosen, type, "chosen_nll");
  const Input pw(pair_weights, chosen, type, "pair_weights");

  const auto run = [&]<typename T>(T) {
    PairBatch<T> batch;
    batch.count = chosen.size(0);
    batch.chosen = c.data<T>();
    batch.rejected = r.data<T>();
    batch.ref_chosen = rc.data<T>();
    batch.ref_rejected = rr.data<T>();
    batch.chosen_lengths = cl.data<int64_t>();
    batch.rejected_lengths = rl.data<int64_t>();
    batch.chosen_nll = one_nll ? chosen_nll->const_data_ptr<T>() : nll.data<T>();
    batch.nll_stride = one_nll ? 0 : 1;
    batch.pair_weights = pw.data<T>();
    return evaluate<T>(device, items, options, batch, chosen, reduction,
                       static_cast<unsigned>(needs));
  };
  return type == ScalarType::Double ? run(double{}) : run(float{});
}

// [loss, losses, rewards, gradients]
using UnpairedResult = std::tuple<Tensor, Tensor, Tensor, OptionalTensor>;

template <typename Device>
UnpairedResult unpaired_loss(const Tensor& logps, const Tensor& ref_logps, const Tensor& labels,
                             const OptionalTensor& shift_value, int64_t loss, double beta,
                             double shift, double desirable_weight, double undesirable_weight,
                             int64_t reduction, int64_t needs) {
  const ScalarType type = logps.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "logps must be float32 or float64");
  STD_TORCH_CHECK(loss >= 0 && loss < static_cast<int64_t>(UnpairedLoss::kCount),
                  "loss must be the code of an unpaired loss; got ", loss);
  STD_TORCH_CHECK(!shift_value || (shift_value->numel() == 1 &&
                                   (shift_value->scalar_type() == ScalarType::Float ||
                                    shift_value->scalar_type() == ScalarType::Double)),
                  "kl or delta must be one float32 or float64 value");
  const Device device(logps);
  const Input x(logps, logps, type, "logps"), ref(ref_logps, logps, type, "ref_logps");
  const Input desirable(labels, logps, ScalarType::Bool, "labels");
  const UnpairedOptions options =
      with_shift({beta, 0.0, 0.0, desirable_weight, undesirable_weight}, shift);
  const int64_t count = logps.size(0);
  const unsigned wanted = static_cast<unsigned>(needs);
  const double scale = scale_of(reduction, count);
  Tensor total = device.empty({}, type), losses = device.empty({count}, type);
  Tensor rewards = device.empty({count}, type);
  OptionalTensor gradients;
  if (wanted != 0) gradients = device.empty({count_bits(wanted), count}, type);
  const auto run = [&]<typename T>(T) {
    device.template evaluate_unpaired<T>(
        static_cast<UnpairedLoss>(loss), options, count, x.data<T>(), ref.data<T>(),
        desirable.data<bool>(), shift_value, scale, wanted, total.mutable_data_ptr<T>(),
        losses.mutable_data_ptr<T>(), rewards.mutable_data_ptr<T>(),
        gradients ? gradients->mutable_data_ptr<T>() : nullptr);
  };
  if (type == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {total, losses, rewards, gradients};
}

using Gradients =
    std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

template <typename Device>
Gradients loss_backward(const OptionalTensor& grad_loss, const OptionalTensor& grad_losses_in,
                        const Tensor& gradients_in, const OptionalTensor& order_in, int64_t needs,
                        int64_t sorted, int64_t reduction, bool one_nll) {
  STD_TORCH_CHECK(gradients_in.dim() == 2 && needs >= 0 && needs < (1 << kInputs) && sorted >= 0 &&
                      sorted <= 3 && reduction >= 0 && reduction <= 1,
                  "gradients, needs, sorted_bits and reduction must be what forward was given");
  const Device device(gradients_in);
  const Tensor gradients = dense(gradients_in);
  const ScalarType type = gradients.scalar_type();
  const int64_t count = gradients.size(1);
  const unsigned wanted = static_cast<unsigned>(needs), sorted_bits = static_cast<unsigned>(sorted);
  const int64_t sorted_rows = order_in ? count_bits(sorted_bits) : 0;
  STD_TORCH_CHECK(gradients.size(0) == count_bits(wanted) + sorted_rows,
                  "gradients must be what forward returned");
  STD_TORCH_CHECK(!order_in || order_in->numel() == 2 * sorted_rows * count,
                  "order must be what forward returned");
  STD_TORCH_CHECK(!grad_loss || (grad_loss->numel() == 1 && grad_loss->scalar_type() == type),
                  "grad_loss must be one value of gradients' dtype");
  check_device(grad_loss, gradients, "grad_loss");
  check_device(grad_losses_in, gradients, "grad_losses");
  check_device(order_in, gradients, "order");
  OptionalTensor order, grad_losses, out[kInputs];
  if (order_in) {
    order = dense(*order_in);
    STD_TORCH_CHECK(order->scalar_type() == ScalarType::Long, "order must be int64");
    device.check_order(*order, count);
  }
  if (grad_losses_in) {
    STD_TORCH_CHECK(grad_losses_in->numel() == count && grad_losses_in->scalar_type() == type,
                    "grad_losses must have one value of gradients' dtype for each pair");
    grad_losses = dense(*grad_losses_in);
  }
  for (int i = 0; i < kInputs; ++i) {
    if ((wanted >> i & 1u) == 0) continue;
    const bool one = one_nll && i == kInputs - 1;
    out[i] = device.empty(one ? std::vector<int64_t>{} : std::vector<int64_t>{count}, type);
  }
  const auto run = [&]<typename T>(T) {
    GradientScale<T> in;
    in.count = count;
    in.needs = wanted;
    in.sorted = order ? sorted_bits : 0u;
    in.gradients = gradients.const_data_ptr<T>();
    in.order = order ? order->const_data_ptr<int64_t>() : nullptr;
    in.grad_total = scale_of(reduction, count);
    in.grad_losses = grad_losses ? grad_losses->const_data_ptr<T>() : nullptr;
    in.sum_nll = one_nll;
    T* rows[kInputs];
    for (int i = 0; i < kInputs; ++i) rows[i] = out[i] ? out[i]->mutable_data_ptr<T>() : nullptr;
    device.template scale_gradients<T>(in, grad_loss ? grad_loss->const_data_ptr<T>() : nullptr,
                                       rows);
  };
  if (type == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace fusedpo
