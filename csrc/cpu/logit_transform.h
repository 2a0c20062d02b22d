// From stored logits to z, by packs. Included by row_kernels_isa.cpp only.
#pragma once

#include "cpu/row_kernels.h"
#include "cpu/vector_math.h"

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

  Pack<C> operator()(Pack<C> x) const { return capped ? cap * tanh_of(inner * x) : inner * x; }

  // d z / d x over `slope`: 1 - tanh^2.
  Pack<C> relative_slope(Pack<C> z) const {
    const Pack<C> t = z / cap;
    return capped ? (C(1) - t) * (C(1) + t) : splat(C(1));
  }
};

// z of one segment: the caller's memory where the transform changes nothing, else a copy.
template <typename C>
static bool is_plain(const Segment& segment, const Folded<C>& f) {
  return segment.bias == nullptr && !f.capped && f.inner == C(1);
}

template <typename C, typename X>
static void transform_logits(const X* x, const Segment& segment, const Folded<C>& f, C* z) {
  const C* bias = static_cast<const C*>(segment.bias);
  if (bias == nullptr) {
    map<C>(x, z, segment.n, [&](Pack<C> v) { return f(v); });
  } else {
    map2<C>(x, bias, z, segment.n, [&](Pack<C> v, Pack<C> b) { return f(v + b); });
  }
}

}  // namespace FUSEDPO_ISA
}  // namespace fusedpo
