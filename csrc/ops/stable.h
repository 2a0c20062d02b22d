// The only file that names Stable ABI headers: aliases, errors, checks and the few torch calls the
// operators make.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/numeric.h"

// The text of the last error inside torch. Exists since torch 2.13, hence weak and declared here.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

// Calls a C function of torch and throws with torch's own message when it fails.
// (STABLE_TORCH_ERROR_CODE_CHECK loses that message while the target is below 2.13.)
#define FUSEDPO_TORCH_CALL(call)                                      \
  do {                                                                \
    if ((call) != TORCH_SUCCESS) ::fusedpo::throw_torch_error(#call); \
  } while (0)

namespace fusedpo {

[[noreturn]] inline void throw_torch_error(const char* call) {
  const bool known = torch_exception_get_what_without_backtrace != nullptr;
  const char* what =
      known ? torch_exception_get_what_without_backtrace() : "see the message on stderr";
  throw std::runtime_error(std::string(what) + " (in " + call + ")");
}

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// out = a @ b on the CPU. out may be a view into a larger tensor. Shapes are checked here because
// mm.out would answer a wrong one by resizing out away from its storage. Neither call is autocast.
inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(out.size(0) == a.size(0) && out.size(1) == b.size(1) && a.size(1) == b.size(0),
                  "mm_out: shapes do not match");
  FUSEDPO_TORCH_CALL(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out += a @ b.
inline void addmm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(out.size(0) == a.size(0) && out.size(1) == b.size(1) && a.size(1) == b.size(0),
                  "addmm_out: shapes do not match");
  FUSEDPO_TORCH_CALL(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

// Rows [begin, begin + rows): a view.
inline Tensor narrowed(Tensor t, int64_t begin, int64_t rows) {
  return torch::stable::narrow(t, 0, begin, rows);
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

inline Tensor columns(Tensor t, int64_t begin, int64_t cols) {
  return torch::stable::narrow(t, 1, begin, cols);
}

// Values of `from` rounded to the type of `to`, whatever their strides.
inline void copy_to(Tensor to, const Tensor& from) { torch::stable::copy_(to, from); }

// The first rows * cols values of a flat buffer as a [rows, cols] matrix.
inline Tensor matrix(const Tensor& buffer, int64_t rows, int64_t cols) {
  Tensor front = narrowed(buffer, 0, rows * cols);
  return torch::stable::view(front, {rows, cols});
}

// An element type's code. Only floating types reach the operators: Python checks first, and so does
// this.
inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      break;
  }
  STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16 values");
}

inline DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

inline ScalarType scalar_type_of(DType type) {
  switch (type) {
    case DType::bf16:
      return ScalarType::BFloat16;
    case DType::f16:
      return ScalarType::Half;
    case DType::f64:
      return ScalarType::Double;
    case DType::f32:
      break;
  }
  return ScalarType::Float;
}

// The type results are computed and returned in: fp64 for fp64 inputs, fp32 for all others.
inline DType result_type(DType input) { return input == DType::f64 ? DType::f64 : DType::f32; }

inline int64_t size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const IntHeaderOnlyArrayRef sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// The dispatcher picks a kernel by one argument and does not compare the devices of the others.
inline void check_device(const OptionalTensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      !t || (t->is_cuda() == like.is_cuda() && t->get_device_index() == like.get_device_index()),
      name, " must be on the device of the operator's first tensor");
}

// "[4, 128]", as Python prints shapes.
inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  }
  return text + "]";
}

inline Tensor empty_as(const Tensor& like, std::vector<int64_t> sizes, DType type) {
  return torch::stable::new_empty(like, sizes, scalar_type_of(type));
}

inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d > 1; --d) strides[d - 2] = strides[d - 1] * sizes[d - 1];
  return strides;
}

// On the CPU, without the cost of a call through the dispatcher, which is most of an operator on
// [B] numbers. `code` is one of aoti_torch_dtype_*().
inline Tensor empty_cpu(const std::vector<int64_t>& sizes, int32_t code) {
  AtenTensorHandle handle = nullptr;
  FUSEDPO_TORCH_CALL(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                              dense_strides(sizes).data(), code,
                                              aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor zeros_as(const Tensor& like, std::vector<int64_t> sizes, DType type) {
  return torch::stable::new_zeros(like, sizes, scalar_type_of(type));
}

// Rows per parallel task so that starting it costs little: about 32k values.
inline int64_t row_grain(int64_t cols) { return 1 + 32768 / (cols + 1); }

// A row value of a tensor of fp32 or fp64.
inline double value_at(const void* data, DType type, int64_t i) {
  return type == DType::f64 ? static_cast<const double*>(data)[i]
                            : static_cast<double>(static_cast<const float*>(data)[i]);
}

inline void set_value(void* data, DType type, int64_t i, double value) {
  if (type == DType::f64) {
    static_cast<double*>(data)[i] = value;
  } else {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

}  // namespace fusedpo
