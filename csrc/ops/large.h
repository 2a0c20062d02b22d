// Large CPU tensors in pages that outlive them (cpu/page_pool.h). What is smaller malloc hands out
// again by itself.
#pragma once

#include <memory>

#include "cpu/page_pool.h"
#include "ops/stable.h"

// A tensor on memory of the caller's. Exists since torch 2.11, hence weak and declared here.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace fusedpo {

constexpr int64_t kLargeBytes = int64_t{4} << 20;

// Like empty_as, for what may be large.
inline Tensor empty_large(const Tensor& like, std::vector<int64_t> sizes, DType type) {
  int64_t bytes = size_of(type);
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < kLargeBytes || torch_from_blob == nullptr) return empty_as(like, sizes, type);
  auto pages = std::make_unique<Pages>(take_pages(static_cast<size_t>(bytes)));
  if (pages->data == nullptr) return empty_as(like, sizes, type);
  const auto give_back = [](void*, void* context) {
    const std::unique_ptr<Pages> owned(static_cast<Pages*>(context));
    return_pages(*owned);
  };
  const auto code =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type_of(type)));
  AtenTensorHandle handle = nullptr;
  if (torch_from_blob(pages->data, static_cast<int64_t>(sizes.size()), sizes.data(),
                      dense_strides(sizes).data(), 0, code, aoti_torch_device_type_cpu(), -1,
                      &handle, aoti_torch_layout_strided(), nullptr, 0, give_back,
                      pages.get()) != TORCH_SUCCESS) {
    return_pages(*pages);
    throw_torch_error("torch_from_blob");
  }
  pages.release();  // the tensor's now
  return Tensor(handle);
}

inline Tensor zeros_large(const Tensor& like, std::vector<int64_t> sizes, DType type) {
  Tensor t = empty_large(like, std::move(sizes), type);
  torch::stable::zero_(t);
  return t;
}

}  // namespace fusedpo
