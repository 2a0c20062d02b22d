// The loss family on CUDA: one launch forward, one backward.
#include "cuda/loss_cuda.h"
#include "ops/cuda_device.h"
#include "ops/loss_operators.h"

namespace fusedpo {
namespace {

class Cuda {
 public:
  explicit Cuda(const Tensor& like) : like_(like), device_(like) {}

  Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) const {
    return torch::stable::new_empty(like_, sizes, type);
  }

  // Its numbers are on the device; the kernel leaves out what is outside.
  void check_order(const Tensor& /*order*/, int64_t /*count*/) const {}

  template <typename T>
  void evaluate_pairs(const std::vector<LossItem>& items, const PairOptions& options,
                      const PairBatch<T>& batch, double scale, unsigned needs,
                      const PairResults<T>& out) const {
    STD_TORCH_CHECK(items.size() <= cuda::kMaxLosses, "a list of losses may have at most ",
                    cuda::kMaxLosses, " entries on CUDA; got ", items.size(),
                    ". Entries of the same name can be joined by adding their weights.");
    cuda::LossList list;
    for (const LossItem& item : items) list.items[list.count++] = item;
    OptionalTensor scratch;
    if (out.order != nullptr) scratch = empty({4 * batch.count}, ScalarType::Double);
    cuda::evaluate_pairs(list, options, batch, scale, needs, out,
                         scratch ? scratch->template mutable_data_ptr<double>() : nullptr,
                         device_.stream);
  }

  template <typename T>
  void evaluate_unpaired(UnpairedLoss loss, const UnpairedOptions& options, int64_t count,
                         const T* logps, const T* ref_logps, const bool* desirable,
                         const OptionalTensor& shift_in, double scale, unsigned needs, T* total,
                         T* losses, T* rewards, T* gradients) const {
    OptionalTensor shift = shift_in;
    if (shift &&
        (shift->scalar_type() != like_.scalar_type() || shift->is_cuda() != like_.is_cuda())) {
      shift = empty(sizes_of(*shift_in), like_.scalar_type());
      copy_to(*shift, *shift_in);
    }
    cuda::evaluate_unpaired(loss, options, count, logps, ref_logps, desirable,
                            shift ? shift->template const_data_ptr<T>() : nullptr, scale, needs,
                            total, losses, rewards, gradients, device_.stream);
  }

  template <typename T>
  void scale_gradients(const GradientScale<T>& in, const T* grad_loss,
                       T* const (&out)[kInputs]) const {
    cuda::scale_gradients(in, grad_loss, out, device_.stream);
  }

 private:
  const Tensor& like_;
  const CudaDevice device_;
};

}  // namespace
}  // namespace fusedpo

STABLE_TORCH_LIBRARY_IMPL(fusedpo, FUSEDPO_CUDA_KEY, m) {
  m.impl("preference_loss", TORCH_BOX(&fusedpo::preference_loss<fusedpo::Cuda>));
  m.impl("unpaired_loss", TORCH_BOX(&fusedpo::unpaired_loss<fusedpo::Cuda>));
  m.impl("loss_backward", TORCH_BOX(&fusedpo::loss_backward<fusedpo::Cuda>));
}
