// The loss family on the device: value, derivatives, rewards, margins and accuracies in one launch
// of one block (B is small), backward in another. The mathematics is core/loss.h, in fp64 per pair.
#pragma once

#include "core/loss_batch.h"
#include "cuda/stream.h"

namespace fusedpo::cuda {

constexpr int kMaxLosses = 32;  // of one list: kernel arguments are copied by value

struct LossList {
  int count = 0;
  LossItem items[kMaxLosses];
};

// As fusedpo::evaluate_pairs on the host. `scratch` holds 4 B doubles where the list sorts the
// batch (then `out.order` is not null either), else null.
template <typename T>
void evaluate_pairs(const LossList& list, const PairOptions& options, const PairBatch<T>& batch,
                    double scale, unsigned needs, const PairResults<T>& out, double* scratch,
                    Stream stream);

// As fusedpo::evaluate_unpaired; shift_value, one T on the device or null, takes the place of
// options.kl and options.delta.
template <typename T>
void evaluate_unpaired(UnpairedLoss loss, const UnpairedOptions& options, int64_t count,
                       const T* logps, const T* ref_logps, const bool* desirable,
                       const T* shift_value, double scale, unsigned needs, T* total, T* losses,
                       T* rewards, T* gradients, Stream stream);

// As fusedpo::scale_gradients, but the upstream gradient of the total is one T on the device (null:
// none), and `in.grad_total` is only its scale.
template <typename T>
void scale_gradients(const GradientScale<T>& in, const T* grad_loss, T* const (&out)[kInputs],
                     Stream stream);

}  // namespace fusedpo::cuda
