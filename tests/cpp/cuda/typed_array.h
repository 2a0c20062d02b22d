// Arrays of an element type chosen at run time, rows of them in any layout, and what a value of
// such a type can hold.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/numeric.h"
#include "cuda/rows.h"
#include "memory.h"

namespace fusedpo {

inline constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

inline const char* name_of(DType type) {
  constexpr const char* kNames[] = {"f32", "bf16", "f16", "f64"};
  return kNames[static_cast<int>(type)];
}

inline size_t item_size(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }
inline DType result_of(DType type) { return type == DType::f64 ? DType::f64 : DType::f32; }

// The spacing of the type's values around x.
inline double ulp(DType type, double x) {
  constexpr int kDigits[] = {24, 8, 11, 53}, kLowest[] = {-149, -133, -24, -1074};
  const int at = static_cast<int>(type);
  const int exponent = x == 0.0 ? -2000 : std::ilogb(x) - kDigits[at] + 1;
  return std::ldexp(1.0, std::max(exponent, kLowest[at]));
}

inline void store(DType type, void* to, size_t i, double value) {
  switch (type) {
    case DType::f32:
      static_cast<float*>(to)[i] = static_cast<float>(value);
      break;
    case DType::bf16:
      from_float(static_cast<float>(value), static_cast<bf16*>(to) + i);
      break;
    case DType::f16:
      from_float(static_cast<float>(value), static_cast<f16*>(to) + i);
      break;
    case DType::f64:
      static_cast<double*>(to)[i] = value;
      break;
  }
}

inline double load(DType type, const void* from, size_t i) {
  switch (type) {
    case DType::bf16:
      return to_float(static_cast<const bf16*>(from)[i]);
    case DType::f16:
      return to_float(static_cast<const f16*>(from)[i]);
    case DType::f64:
      return static_cast<const double*>(from)[i];
    default:
      return static_cast<const float*>(from)[i];
  }
}

inline double rounded(DType type, double value) {
  double holder = 0.0;
  store(type, &holder, 0, value);
  return load(type, &holder, 0);
}

// "Device" memory of one type; unwritten unless it is given values.
class TypedArray {
 public:
  TypedArray(DType type, size_t count, size_t offset = 0)
      : type_(type), count_(count), memory_(count * item_size(type), offset * item_size(type)) {}

  TypedArray(DType type, const std::vector<double>& values, size_t offset = 0)
      : TypedArray(type, values.size(), offset) {
    for (size_t i = 0; i < count_; ++i) set(i, values[i]);
    memory_.set_written();
  }

  DType type() const { return type_; }
  size_t size() const { return count_; }
  void* data() const { return memory_.data(); }
  const void* at(size_t i) const { return static_cast<char*>(data()) + i * item_size(type_); }
  double get(size_t i) const { return load(type_, data(), i); }
  void set(size_t i, double value) { store(type_, data(), i, value); }
  void set_written() { memory_.set_written(); }
  void forbid(size_t from, size_t to) {
    memory_.forbid(from * item_size(type_), to * item_size(type_));
  }
  std::vector<double> host() const {
    std::vector<double> values(count_);
    for (size_t i = 0; i < count_; ++i) values[i] = get(i);
    return values;
  }
  std::vector<char> bytes() const {
    const char* begin = static_cast<const char*>(data());
    return std::vector<char>(begin, begin + memory_.size());
  }

 private:
  DType type_;
  size_t count_;
  cuda_host::DeviceMemory memory_;
};

// How rows lie: one after another; from an address that no vector starts at; with a gap between
// them that moves every row's first vector; as three leading dimensions in a mixed order.
enum class Lie { kDense, kMisaligned, kPadded, kMixed };
inline constexpr Lie kLies[] = {Lie::kDense, Lie::kMisaligned, Lie::kPadded, Lie::kMixed};

// `n` rows of `cols` values; n must be divisible by 4. What lies between rows is out of bounds.
class TypedRows {
 public:
  TypedRows(DType type, size_t n, size_t cols, Lie lie)
      : n_(n),
        cols_(cols),
        ld_(lie == Lie::kPadded  ? cols + 3
            : lie == Lie::kMixed ? cols + 1
                                 : cols),
        array(type, n * ld_,
              lie == Lie::kMisaligned ? 8 / item_size(type) + (type == DType::f64 ? 0 : 1) : 0) {
    cuda::RowLayout& l = view.layout;
    const auto ld = static_cast<int64_t>(ld_), rows = static_cast<int64_t>(n);
    l.size[0] = rows;
    l.stride[0] = ld;
    if (lie == Lie::kMixed) {  // [2, n / 4, 2], the last dimension outermost in memory
      l.dims = 3;
      const int64_t size[] = {2, rows / 4, 2}, stride[] = {rows / 4 * ld, ld, rows / 2 * ld};
      std::copy(size, size + 3, l.size);
      std::copy(stride, stride + 3, l.stride);
    }
    view.data = array.data();
    view.type = type;
    view.n = rows;
    view.cols = static_cast<int64_t>(cols);
    for (size_t i = 0; i < n && ld_ > cols; ++i) array.forbid(i * ld_ + cols, (i + 1) * ld_);
  }

  void set(const std::vector<std::vector<double>>& rows) {
    for (size_t i = 0; i < n_; ++i) {
      for (size_t v = 0; v < cols_; ++v) array.set(offset(i) + v, rows[i][v]);
    }
    array.set_written();
  }

  size_t offset(size_t row) const {
    return static_cast<size_t>(view.layout.offset(static_cast<int64_t>(row)));
  }
  const void* row(size_t i) const { return array.at(offset(i)); }
  double get(size_t i, size_t v) const { return array.get(offset(i) + v); }

 private:
  size_t n_, cols_, ld_;

 public:
  TypedArray array;
  cuda::RowsView view;
};

}  // namespace fusedpo
