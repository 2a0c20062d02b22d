// The row kernels, compiled once per instruction set with FUSEDPO_ISA set to its name. No C++
// library header is included and nothing but the table has external linkage: see core/numeric.h.
#include "cpu/row_kernels.h"
#include "cpu/vector_math.h"

#define FUSEDPO_STRING_(x) #x
#define FUSEDPO_STRING(x) FUSEDPO_STRING_(x)

namespace fusedpo {
namespace FUSEDPO_ISA {

// The transform with its constants folded, in the compute type:
// z = cap * tanh(inner * (x + bias)), or inner * (x + bias) without softcap.
template <typename C>
struct Folded {
  bool capped;
  C inner, cap, slope;  // slope = scale / temperature: d z / d x where tanh' = 1

  explicit Folded(const LogitTransform& t)
      : capped(t.softcap > 0),
        inner(static_cast<C>(t.softcap > 0 ? t.scale / t.softcap : t.scale / t.temperature)),
        cap(static_cast<C>(t.softcap > 0 ? t.softcap / t.temperature : 0)),
        slope(static_cast<C>(t.scale / t.temperature)) {}

  C operator()(C x) const { return capped ? cap * tanh_of(inner * x) : inner * x; }

  // d z / d x over `slope`: 1 - tanh^2.
  C relative_slope(C z) const {
    const C t = z / cap;
    return capped ? (1 - t) * (1 + t) : C(1);
  }
};

template <typename C, typename X>
static void load_logits(const X* x, const C* bias, int64_t n, const Folded<C>& f, C* z) {
  const C inner = f.inner, cap = f.cap;
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = inner * (load<C>(x[i]) + bias[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = inner * load<C>(x[i]);
  }
  if (f.capped) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = cap * tanh_of(z[i]);
  }
}

// Moves the anchor to `max` and returns exp(old - new).
static double move_anchor(double max, RowStats* s) {
  if (max == s->max) return 1.0;
  const double shift = s->max - max;
  const double factor = exp(shift);
  if (s->rest != 0.0) s->rest_z = factor * (s->rest_z + s->rest * shift);
  s->rest *= factor;
  s->rest_sq *= factor * factor;
  s->max = max;
  return factor;
}

template <typename C>
static double accumulate_as(const Segment& segment, const LogitTransform& transform,
                            unsigned metrics, const double* exact_target, RowStats* s, void* e,
                            DType e_type) {
  C z[kMaxSegment], exp_z[kMaxSegment];
  const int64_t n = segment.n, y = segment.label;
  const Folded<C> f(transform);
  const C* bias = static_cast<const C*>(segment.bias);
  with_type(segment.x_type, segment.x, [&](auto* x) { load_logits<C>(x, bias, n, f, z); });

  if (metrics & kMeanLogits) s->sum += sum_of(n, [&](int64_t i) { return z[i]; });
  const bool has_label = y >= 0 && y < n;
  const C before = max_of(z, 0, has_label ? y : n);
  const C after = has_label ? max_of(z, y + 1, n) : before;
  double max = s->max;
  if (has_label) {
    s->seen = true;
    s->compared = static_cast<double>(z[y]);
    // Nothing stands before the first value: there even -inf, or NaN as in torch, is a maximum.
    s->beaten = (s->count > 0 && !(s->compared > max)) || (y > 0 && !(z[y] > before));
    const C b = bias == nullptr ? C(0) : bias[y];
    const C target = exact_target == nullptr ? z[y] : f(static_cast<C>(*exact_target) + b);
    s->target = static_cast<double>(target);
    s->target_slope = static_cast<double>(f.relative_slope(target));
    z[y] = -static_cast<C>(INFINITY);
    max = s->target > max ? s->target : max;
  }
  s->beaten = s->beaten || (s->seen && static_cast<double>(after) > s->compared);
  s->count += n;
  max = static_cast<double>(before) > max ? static_cast<double>(before) : max;
  max = static_cast<double>(after) > max ? static_cast<double>(after) : max;

  double factor = 1.0;
  if (max == -INFINITY) {  // nothing but masked logits so far: no anchor yet, no mass
    for (int64_t i = 0; i < n; ++i) exp_z[i] = z[i] == z[i] ? C(0) : z[i];
    s->rest += sum_of(n, [&](int64_t i) { return exp_z[i]; });
  } else {
    factor = move_anchor(max, s);
    const C m = static_cast<C>(max);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) exp_z[i] = exp_nonpositive(z[i] - m);
    s->rest += sum_of(n, [&](int64_t i) { return exp_z[i]; });
    if (metrics & kEntropy) {
      const C floor = exp_floor(C(0));
      s->rest_z += sum_of(n, [&](int64_t i) {
        const C d = z[i] - m;
        return static_cast<double>(exp_z[i]) * static_cast<double>(d < floor ? floor : d);
      });
    }
    if (metrics & kLogSumSqProbs) {
      s->rest_sq += sum_of(n, [&](int64_t i) {
        return static_cast<double>(exp_z[i]) * static_cast<double>(exp_z[i]);
      });
    }
  }
  if (e != nullptr) {
    if (f.capped) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) exp_z[i] *= f.relative_slope(z[i]);
      if (has_label) exp_z[y] = 0;
    }
    store_as(exp_z, e, e_type, n);
  }
  return factor;
}

template <typename C>
static void gradient_as(const Segment& segment, const LogitTransform& transform,
                        const RowGradient& row, void* out, DType out_type) {
  C z[kMaxSegment], grad[kMaxSegment];
  const int64_t n = segment.n, y = segment.label;
  const Folded<C> f(transform);
  const C* bias = static_cast<const C*>(segment.bias);
  with_type(segment.x_type, segment.x, [&](auto* x) { load_logits<C>(x, bias, n, f, z); });

  const C m = static_cast<C>(row.max), log_s = static_cast<C>(row.log_sum);
  const C c_logp = static_cast<C>(-row.grad_logp) * f.slope;
  if (row.grad_entropy == 0.0) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) grad[i] = c_logp * exp_nonpositive((z[i] - m) - log_s);
  } else {
    const C c_entropy = static_cast<C>(-row.grad_entropy) * f.slope;
    const C h = static_cast<C>(row.entropy), floor = exp_floor(C(0));
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const C logp = (z[i] - m) - log_s;
      const C bounded = logp < floor ? floor : logp;
      grad[i] = exp_nonpositive(logp) * (c_logp + c_entropy * (bounded + h));
    }
  }
  if (y >= 0 && y < n) {
    // Not p_y - 1: a difference, even one that a fused multiply-add rounds once, would cancel.
    const C logp = (z[y] - m) - log_s, floor = exp_floor(C(0));
    const C c_entropy = static_cast<C>(-row.grad_entropy) * f.slope;
    const C of_entropy = row.grad_entropy == 0.0
                             ? C(0)
                             : exp_nonpositive(logp) * c_entropy *
                                   ((logp < floor ? floor : logp) + static_cast<C>(row.entropy));
    grad[y] = of_entropy - c_logp * static_cast<C>(row.rest_share);
  }
  if (f.capped) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) grad[i] *= f.relative_slope(z[i]);
  }
  store_as(grad, out, out_type, n);
}

static double accumulate(DType compute, const Segment& segment, const LogitTransform& transform,
                         unsigned metrics, const double* exact_target, RowStats* stats, void* e,
                         DType e_type) {
  return compute == DType::f64
             ? accumulate_as<double>(segment, transform, metrics, exact_target, stats, e, e_type)
             : accumulate_as<float>(segment, transform, metrics, exact_target, stats, e, e_type);
}

static void gradient(DType compute, const Segment& segment, const LogitTransform& transform,
                     const RowGradient& row, void* out, DType out_type) {
  if (compute == DType::f64) return gradient_as<double>(segment, transform, row, out, out_type);
  gradient_as<float>(segment, transform, row, out, out_type);
}

static void convert(DType from, const void* x, DType through, DType to, void* out, int64_t n) {
  if (from == DType::f64) return store_as(static_cast<const double*>(x), out, to, n);
  const int64_t out_size = to == DType::f64 ? 8 : to == DType::f32 ? 4 : 2;
  float buffer[1024];
  bf16 rounded_bf16[1024];
  f16 rounded_f16[1024];
  for (int64_t begin = 0; begin < n; begin += 1024) {
    const int64_t count = begin + 1024 < n ? 1024 : n - begin;
    with_type(from, x, [&](auto* p) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) buffer[i] = load<float>(p[begin + i]);
    });
    if (through == DType::bf16 && from != DType::bf16) {
      store_all(buffer, rounded_bf16, count);
      for (int64_t i = 0; i < count; ++i) buffer[i] = to_float(rounded_bf16[i]);
    } else if (through == DType::f16 && from != DType::f16) {
      store_all(buffer, rounded_f16, count);
      for (int64_t i = 0; i < count; ++i) buffer[i] = to_float(rounded_f16[i]);
    }
    store_as(buffer, static_cast<char*>(out) + begin * out_size, to, count);
  }
}

template <typename C, typename X>
static void scale_add_as(C a, C* y, C b, const X* x, int64_t n) {
  if (a == 0) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = b * load<C>(x[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = a * y[i] + b * load<C>(x[i]);
  }
}

static void scale_add(DType compute, double a, void* y, double b, const void* x, DType x_type,
                      int64_t n) {
  with_type(x_type, x, [&](auto* p) {
    if (compute == DType::f64) {
      scale_add_as(a, static_cast<double*>(y), b, p, n);
    } else {
      scale_add_as(static_cast<float>(a), static_cast<float*>(y), static_cast<float>(b), p, n);
    }
  });
}

template <typename C>
static void scale_as(C a, const C* x, void* out, DType out_type, int64_t n) {
  C buffer[1024];
  const int64_t out_size = out_type == DType::f64 ? 8 : out_type == DType::f32 ? 4 : 2;
  for (int64_t begin = 0; begin < n; begin += 1024) {
    const int64_t count = begin + 1024 < n ? 1024 : n - begin;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffer[i] = a * x[begin + i];
    store_as(buffer, static_cast<char*>(out) + begin * out_size, out_type, count);
  }
}

static void scale(DType compute, double a, const void* x, void* out, DType out_type, int64_t n) {
  if (compute == DType::f64) return scale_as(a, static_cast<const double*>(x), out, out_type, n);
  scale_as(static_cast<float>(a), static_cast<const float*>(x), out, out_type, n);
}

static double dot(DType compute, const void* a, DType a_type, const void* b, DType b_type,
                  int64_t n) {
  return with_type(a_type, a, [&](auto* p) {
    return with_type(b_type, b, [&](auto* q) {
      if (compute == DType::f64) {
        return sum_of(n, [&](int64_t i) { return load<double>(p[i]) * load<double>(q[i]); });
      }
      return sum_of(n, [&](int64_t i) { return load<float>(p[i]) * load<float>(q[i]); });
    });
  });
}

extern const RowKernels table;
const RowKernels table = {
    FUSEDPO_STRING(FUSEDPO_ISA), accumulate, gradient, convert, scale_add, scale, dot};

}  // namespace FUSEDPO_ISA
}  // namespace fusedpo
