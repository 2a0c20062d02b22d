// The row kernels, compiled once per instruction set with FUSEDPO_ISA set to its name. No C++
// library header is included and nothing but the table has external linkage: see core/numeric.h.
#include "cpu/row_kernels.h"

#include "cpu/row_gradient.h"
#include "cpu/row_sums.h"

#define FUSEDPO_STRING_(x) #x
#define FUSEDPO_STRING(x) FUSEDPO_STRING_(x)

namespace fusedpo {
namespace FUSEDPO_ISA {

template <typename Through>
static inline Floats rounded(Floats x) {
  Through narrow[kWidth];
  store_pack(x, narrow);
  load_pack(narrow, &x);
  return x;
}

static void convert(DType from, const void* x, DType through, DType to, void* out, int64_t n) {
  if (from == DType::f64) {
    memmove(out, x, static_cast<size_t>(n) * sizeof(double));
    return;
  }
  with_type<float>(from, x, [&](auto* p) {
    with_type<float>(to, out, [&](auto* like) {
      auto* q = same_type(like, out);
      if (through == DType::bf16) return map<float>(p, q, n, rounded<bf16>);
      if (through == DType::f16) return map<float>(p, q, n, rounded<f16>);
      map<float>(p, q, n, [](Floats v) { return v; });
    });
  });
}

template <typename C>
static void scale_add_as(C a, C* y, C b, const void* x, DType x_type, int64_t n) {
  with_type<C>(x_type, x, [&](auto* p) {
    if (a == 0) return map<C>(p, y, n, [&](Pack<C> v) { return b * v; });
    map2<C>(p, y, y, n, [&](Pack<C> v, Pack<C> sum) { return a * sum + b * v; });
  });
}

static void scale_add(DType compute, double a, void* y, double b, const void* x, DType x_type,
                      int64_t n) {
  if (compute == DType::f64) return scale_add_as(a, static_cast<double*>(y), b, x, x_type, n);
  scale_add_as(static_cast<float>(a), static_cast<float*>(y), static_cast<float>(b), x, x_type, n);
}

template <typename C>
static void scale_as(C a, const C* x, void* out, DType out_type, int64_t n) {
  with_type<C>(out_type, out, [&](auto* like) {
    map<C>(x, same_type(like, out), n, [&](Pack<C> v) { return a * v; });
  });
}

static void scale(DType compute, double a, const void* x, void* out, DType out_type, int64_t n) {
  if (compute == DType::f64) return scale_as(a, static_cast<const double*>(x), out, out_type, n);
  scale_as(static_cast<float>(a), static_cast<const float*>(x), out, out_type, n);
}

template <typename C>
static double dot_as(const void* a, DType a_type, const void* b, DType b_type, int64_t n) {
  return with_type<C>(a_type, a, [&](auto* p) {
    return with_type<C>(b_type, b, [&](auto* q) {
      constexpr int64_t width = PackOf<C>::width;
      Sum<C> sum;
      for (int64_t i = 0; i < n; i += width) {
        const int64_t count = n - i < width ? n - i : width;
        sum.add(load_some<C>(p + i, count, C(0)) * load_some<C>(q + i, count, C(0)));
      }
      return sum.total();
    });
  });
}

static double dot(DType compute, const void* a, DType a_type, const void* b, DType b_type,
                  int64_t n) {
  return compute == DType::f64 ? dot_as<double>(a, a_type, b, b_type, n)
                               : dot_as<float>(a, a_type, b, b_type, n);
}

extern const RowKernels table;
const RowKernels table = {
    FUSEDPO_STRING(FUSEDPO_ISA), accumulate, gradient, convert, scale_add, scale, dot};

}  // namespace FUSEDPO_ISA
}  // namespace fusedpo
