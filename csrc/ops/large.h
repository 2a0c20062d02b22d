// Large CPU tensors, in pages that the next step takes again (cpu/page_pool.h).
#pragma once

#include <cstdlib>
#include <memory>
#include <string>

#include "cpu/page_pool.h"
#include "ops/stable.h"

// A tensor on memory of the caller's. Exists since torch 2.11, hence weak and declared here.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace fusedpo {

// From here on a tensor has pages of its own. malloc reuses smaller ones, and larger ones up to
// 32 MiB only once it has learned to.
constexpr int64_t kLargeBytes = int64_t{4} << 20;
constexpr int64_t kFreshBytes = int64_t{32} << 20;  // malloc never reuses what is larger

// FUSEDPO_PAGE_POOL=off in the environment gives every page back at once: for schedulers that end
// processes by their resident memory, and for measuring it.
inline bool pools_pages() {
  static const bool pools = [] {
    const char* wanted = std::getenv("FUSEDPO_PAGE_POOL");
    const std::string choice(wanted == nullptr || *wanted == '\0' ? "on" : wanted);
    STD_TORCH_CHECK(choice == "on" || choice == "off", "FUSEDPO_PAGE_POOL must be on or off; got ",
                    choice);
    return choice == "on" && torch_from_blob != nullptr;
  }();
  return pools;
}

// A tensor that owns `pages`.
inline Tensor tensor_on(std::unique_ptr<Pages> pages, const std::vector<int64_t>& sizes,
                        DType type) {
  const std::vector<int64_t> strides = dense_strides(sizes);
  const auto code =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type_of(type)));
  const auto give_back = [](void*, void* context) {
    const std::unique_ptr<Pages> owned(static_cast<Pages*>(context));
    return_pages(*owned);
  };
  AtenTensorHandle handle = nullptr;
  // A call that fails may have run the deleter or not, so from here on the pages are torch's.
  Pages* const owned = pages.release();
  FUSEDPO_TORCH_CALL(torch_from_blob(owned->data, static_cast<int64_t>(sizes.size()), sizes.data(),
                                     strides.data(), 0, code, aoti_torch_device_type_cpu(), -1,
                                     &handle, aoti_torch_layout_strided(), nullptr, 0, give_back,
                                     owned));
  return Tensor(handle);
}

// Like empty_as, for what may be large.
inline Tensor empty_large(const Tensor& like, std::vector<int64_t> sizes, DType type) {
  int64_t bytes = size_of(type);
  for (const int64_t size : sizes) bytes *= size;
  if (bytes >= kLargeBytes && pools_pages()) {
    auto pages = std::make_unique<Pages>(take_pages(static_cast<size_t>(bytes)));
    if (pages->data != nullptr) return tensor_on(std::move(pages), sizes, type);
  }
  Tensor t = empty_as(like, std::move(sizes), type);
  if (bytes >= kFreshBytes) advise_huge_pages(t.data_ptr(), static_cast<size_t>(bytes));
  return t;
}

inline Tensor zeros_large(const Tensor& like, std::vector<int64_t> sizes, DType type) {
  Tensor t = empty_large(like, std::move(sizes), type);
  torch::stable::zero_(t);
  return t;
}

}  // namespace fusedpo
