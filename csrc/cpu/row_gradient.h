// The backward kernel: d loss / d x over one segment. Included by row_kernels_isa.cpp only.
#pragma once

#include "cpu/logit_transform.h"

namespace fusedpo {
namespace FUSEDPO_ISA {

template <typename C, typename Z, typename Out>
static void gradient_of(const Z* z, const Segment& segment, const Folded<C>& f,
                        const RowGradient& row, Out* out) {
  const int64_t n = segment.n, y = segment.label;
  const bool has_label = y >= 0 && y < n;
  const Pack<C> at_label = has_label ? load_some<C>(z + y, 1, C(0)) : splat(C(0));
  const C m = static_cast<C>(row.max), log_s = static_cast<C>(row.log_sum);
  const C c_logp = static_cast<C>(-row.grad_logp) * f.slope;
  const C c_entropy = static_cast<C>(-row.grad_entropy) * f.slope;
  const C h = static_cast<C>(row.entropy), floor = exp_floor(C(0));
  const auto log_p = [&](Pack<C> v) { return (v - m) - log_s; };
  const auto of_entropy = [&](Pack<C> logp) {
    return c_entropy * (bounded_below(logp, floor) + h);
  };
  const auto times_slope = [&](Pack<C> value, Pack<C> v) {
    return f.capped ? value * f.relative_slope(v) : value;
  };
  if (row.grad_entropy == 0.0) {
    map<C>(z, out, n, [&](Pack<C> v) { return times_slope(c_logp * exp_of(log_p(v)), v); });
  } else {
    map<C>(z, out, n, [&](Pack<C> v) {
      const Pack<C> logp = log_p(v);
      return times_slope(exp_of(logp) * (c_logp + of_entropy(logp)), v);
    });
  }
  if (has_label) {
    // Not p_y - 1: a difference, even one that a fused multiply-add rounds once, would cancel.
    Pack<C> value = splat(-c_logp * static_cast<C>(row.rest_share));
    if (row.grad_entropy != 0.0) {
      const Pack<C> logp = log_p(at_label);
      value = exp_of(logp) * of_entropy(logp) + value;
    }
    store_some(times_slope(value, at_label), out + y, 1);
  }
}

template <typename C>
static void gradient_as(const Segment& segment, const LogitTransform& transform,
                        const RowGradient& row, void* out, DType out_type) {
  const Folded<C> f(transform);
  with_type<C>(segment.x_type, segment.x, [&](auto* x) {
    with_type<C>(out_type, out, [&](auto* like) {
      auto* typed = same_type(like, out);
      if (is_plain(segment, f)) return gradient_of(x, segment, f, row, typed);
      C z[kMaxSegment];
      transform_logits(x, segment, f, z);
      gradient_of<C, C>(z, segment, f, row, typed);
    });
  });
}

static void gradient(DType compute, const Segment& segment, const LogitTransform& transform,
                     const RowGradient& row, void* out, DType out_type) {
  if (compute == DType::f64) return gradient_as<double>(segment, transform, row, out, out_type);
  gradient_as<float>(segment, transform, row, out, out_type);
}

}  // namespace FUSEDPO_ISA
}  // namespace fusedpo
