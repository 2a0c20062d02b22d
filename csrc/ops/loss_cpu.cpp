// The loss family on the CPU.
#include "cpu/loss_cpu.h"

#include <algorithm>

#include "ops/loss_operators.h"

namespace fusedpo {
namespace {

class Cpu {
 public:
  explicit Cpu(const Tensor& /*like*/) {}

  Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) const {
    return empty_cpu(sizes, code_of(type));
  }

  void check_order(const Tensor& order, int64_t count) const {
    const int64_t* at = order.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < order.numel(); ++i) {
      STD_TORCH_CHECK(at[i] >= 0 && at[i] < count, "order must hold positions in [0, ", count,
                      "); got ", at[i]);
    }
  }

  template <typename T>
  void evaluate_pairs(const std::vector<LossItem>& items, const PairOptions& options,
                      const PairBatch<T>& batch, double scale, unsigned needs,
                      const PairResults<T>& out) const {
    fusedpo::evaluate_pairs(items, options, batch, scale, needs, out);
  }

  template <typename T>
  void evaluate_unpaired(UnpairedLoss loss, UnpairedOptions options, int64_t count, const T* logps,
                         const T* ref_logps, const bool* desirable, const OptionalTensor& shift,
                         double scale, unsigned needs, T* total, T* losses, T* rewards,
                         T* gradients) const {
    if (shift)
      options = with_shift(options, value_at(shift->const_data_ptr(), dtype_of(*shift), 0));
    fusedpo::evaluate_unpaired(loss, options, count, logps, ref_logps, desirable, scale, needs,
                               total, losses, rewards, gradients);
  }

  // in.grad_total is the scale of *grad_loss.
  template <typename T>
  void scale_gradients(GradientScale<T> in, const T* grad_loss, T* const (&out)[kInputs]) const {
    in.grad_total = grad_loss == nullptr ? 0.0 : static_cast<double>(*grad_loss) * in.grad_total;
    fusedpo::scale_gradients(in, out);
  }
};

// On the CPU only: another device would have to be waited for.
bool has_empty_completion(const Tensor& chosen_lengths, const Tensor& rejected_lengths) {
  const Input chosen(chosen_lengths, chosen_lengths, ScalarType::Long, "lengths");
  const Input rejected(rejected_lengths, chosen_lengths, ScalarType::Long, "lengths");
  const auto any_empty = [&](const Input& lengths) {
    const int64_t* n = lengths.data<int64_t>();
    return std::any_of(n, n + chosen_lengths.size(0), [](int64_t length) { return length < 1; });
  };
  return any_empty(chosen) || any_empty(rejected);
}

}  // namespace
}  // namespace fusedpo

STABLE_TORCH_LIBRARY_IMPL(fusedpo, CPU, m) {
  m.impl("preference_loss", TORCH_BOX(&fusedpo::preference_loss<fusedpo::Cpu>));
  m.impl("unpaired_loss", TORCH_BOX(&fusedpo::unpaired_loss<fusedpo::Cpu>));
  m.impl("has_empty_completion", TORCH_BOX(&fusedpo::has_empty_completion));
  m.impl("loss_backward", TORCH_BOX(&fusedpo::loss_backward<fusedpo::Cpu>));
}
