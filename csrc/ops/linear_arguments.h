// The arguments that forward and backward of linear_token_logps share, on every device.
#pragma once

#include "core/logit_row.h"
#include "ops/rows.h"

namespace fusedpo {

// The operators' arguments that have a gradient: bits of want_grads and needs.
enum Gradient : int64_t { kHidden = 1, kWeight = 2, kBias = 4, kLoraHidden = 8, kLoraWeight = 16 };

struct LinearArguments {
  const Tensor& hidden;
  const Tensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& lora_hidden;
  const OptionalTensor& lora_weight;
  const Tensor& labels;
  int64_t ignore_index;
  LogitTransform transform;
  DType compute;
  int64_t vocab_tile;

  void check() const {
    check_rows(hidden, labels, "hidden");
    STD_TORCH_CHECK(lora_hidden.has_value() == lora_weight.has_value(),
                    "lora_hidden and lora_weight go together");
    STD_TORCH_CHECK(vocab_tile >= 1, "vocab_tile must be at least 1; got ", vocab_tile);
    const auto fits = [&](const Tensor& t) {
      return (dtype_of(t) == DType::f64) == (compute == DType::f64);
    };
    STD_TORCH_CHECK(fits(hidden) && fits(weight) && (!bias || fits(*bias)) &&
                        (!lora_hidden || (fits(*lora_hidden) && fits(*lora_weight))),
                    "float64 operands are computed in float64, and no others are");
  }
};

}  // namespace fusedpo
