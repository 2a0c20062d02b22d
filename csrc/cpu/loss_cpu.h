// The loss family over a batch on the host: a whole list of losses in one pass over [B] vectors,
// with the derivatives, so that backward has only to scale them.
//
// T is float or double; the arithmetic per pair is fp64 and is rounded once, when it is stored.
#pragma once

#include <cstdint>
#include <vector>

#include "core/loss_batch.h"

namespace fusedpo {

// Evaluates sum_k weight_k loss_k for every pair.
template <typename T>
void evaluate_pairs(const std::vector<LossItem>& items, const PairOptions& options,
                    const PairBatch<T>& batch, double scale, unsigned needs,
                    const PairResults<T>& out);

// Evaluates one unpaired loss. `gradients` has the rows that `needs` names.
template <typename T>
void evaluate_unpaired(UnpairedLoss loss, const UnpairedOptions& options, int64_t count,
                       const T* logps, const T* ref_logps, const bool* desirable, double scale,
                       unsigned needs, T* total, T* losses, T* rewards, T* gradients);

// out[i] is the gradient of input i (in the order of GradientNeed), null where not wanted.
template <typename T>
void scale_gradients(const GradientScale<T>& in, T* const (&out)[kInputs]);

}  // namespace fusedpo
