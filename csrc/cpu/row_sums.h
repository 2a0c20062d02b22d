// The forward kernel: the sums over one segment, and exp(z - m) where it is wanted. Included by
// row_kernels_isa.cpp only.
#pragma once

#include "cpu/logit_transform.h"
#include "cpu/row_stats.h"

namespace fusedpo {
namespace FUSEDPO_ISA {

// How far above the anchor a logit may lie before the anchor moves to it. The larger, the more
// digits exp(z - anchor) loses where it is large; the smaller, the more often a segment is swept
// twice. At 2 the error of an entropy grows by a tenth of itself, and it is a quarter of what
// log_softmax in fp32 makes of it; at 8 it is larger. In fp64 the anchor is the maximum.
template <typename C>
constexpr double kReach = sizeof(C) == 8 ? 0.0 : 2.0;
// A row's first values show where its logits lie, should the guess lie far below.
constexpr int64_t kSample = 1024;

// Sums over values other than the label's, in units of exp(-anchor).
template <typename C>
struct Sums {
  Sum<C> rest, rest_z, rest_sq, z;
};

// Adds z[0..n) to the sums and returns the largest. Eight packs, of the metrics' sums sixteen, are
// summed in C before they are widened: the roundings are of the size of a term's own error. With
// kStore writes exp(z - m) to e, which may be z.
template <typename C, bool kMetrics, bool kStore, typename X>
static C sweep(const X* x, int64_t n, C m, X* e, Sums<C>* sums) {
  constexpr int64_t width = PackOf<C>::width, packs = 8, block = packs * width;
  const C floor = exp_floor(C(0));
  Sums<C> s = *sums;
  Pack<C> max = splat(-static_cast<C>(INFINITY));
  int64_t i = 0;
  while (i + 2 * block <= n) {
    Pack<C> rest_z{}, rest_sq{}, sum_z{};
    for (const int64_t end = i + 2 * block; i < end; i += block) {
      fetch_ahead(x + i, block * int64_t{sizeof(X)});
      Pack<C> rest{};
      for (int64_t k = 0; k < packs; ++k) {
        Pack<C> z;
        load_pack(x + i + k * width, &z);
        max = larger(z, max);
        const Pack<C> d = bounded_below(z - m, floor);  // exp(-inf) (-inf) counts for nothing
        const Exp<Pack<C>> t = exp_bounded(d);
        rest = t.added_to(rest);
        if constexpr (kMetrics) {
          rest_z += t.value() * d;
          rest_sq += t.value() * t.value();
          sum_z += z;
        }
        if constexpr (kStore) store_pack(t.value(), e + i + k * width);
      }
      s.rest.add(rest);
    }
    if constexpr (kMetrics) {
      s.rest_z.add(rest_z);
      s.rest_sq.add(rest_sq);
      s.z.add(sum_z);
    }
  }
  for (; i < n; i += width) {
    const int64_t count = n - i < width ? n - i : width;
    const Pack<C> z = load_some<C>(x + i, count, -static_cast<C>(INFINITY));
    const Pack<C> d = bounded_below(z - m, floor), t = exp_bounded(d).value();
    max = larger(z, max);
    s.rest.add(t);
    if constexpr (kMetrics) {
      s.rest_z.add(t * d);
      s.rest_sq.add(t * t);
      s.z.add(load_some<C>(x + i, count, C(0)));
    }
    if constexpr (kStore) store_some(t, e + i, count);
  }
  *sums = s;
  return largest(max);
}

template <typename C, typename X>
static C max_of(const X* x, int64_t n) {
  constexpr int64_t width = PackOf<C>::width;
  Pack<C> max[4];  // four at a time: one would wait for its own latency
  for (Pack<C>& m : max) m = splat(-static_cast<C>(INFINITY));
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) {
    for (int k = 0; k < 4; ++k) {
      Pack<C> z;
      load_pack(x + i + k * width, &z);
      max[k] = larger(z, max[k]);
    }
  }
  for (; i < n; i += width) {
    const Pack<C> z = load_some<C>(x + i, n - i < width ? n - i : width, -static_cast<C>(INFINITY));
    max[0] = larger(z, max[0]);
  }
  for (int k = 1; k < 4; ++k) max[0] = larger(max[k], max[0]);
  return largest(max[0]);
}

// The values of a segment on either side of its label, or all of them on one side.
template <typename C, typename X>
struct Sides {
  const X* x;
  int64_t left, right_begin, right;

  Sides(const X* values, int64_t n, int64_t y)
      : x(values),
        left(y >= 0 && y < n ? y : n),
        right_begin(left < n ? y + 1 : n),
        right(n - right_begin) {}

  // Sums over both; `before` and `after` become their maxima, or both the one side's.
  template <bool kMetrics, bool kStore>
  void sweep_both(C m, X* e, Sums<C>* sums, C* before, C* after) const {
    X* const right_e = kStore ? e + right_begin : nullptr;
    *before = sweep<C, kMetrics, kStore>(x, left, m, e, sums);
    *after = sweep<C, kMetrics, kStore>(x + right_begin, right, m, right_e, sums);
  }
  void sweep_both(bool metrics, C m, X* e, Sums<C>* sums, C* before, C* after) const {
    if (metrics) {
      if (e != nullptr) return sweep_both<true, true>(m, e, sums, before, after);
      return sweep_both<true, false>(m, e, sums, before, after);
    }
    if (e != nullptr) return sweep_both<false, true>(m, e, sums, before, after);
    sweep_both<false, false>(m, e, sums, before, after);
  }
  void maxima(C* before, C* after) const {
    *before = max_of<C>(x, left);
    *after = max_of<C>(x + right_begin, right);
  }
};

template <typename C>
static double reached(double anchor, double max) {
  return max > anchor + kReach<C> ? max : anchor;
}

// Adds the values but the label's to `s`; returns the factor of the anchor's move.
template <typename C, typename X>
static double accumulate_rest(const X* x, int64_t n, int64_t y, bool metrics, X* e, RowStats* s,
                              C* before, C* after) {
  const Sides<C, X> sides(x, n, y);
  const auto highest = [&] { return static_cast<double>(*before > *after ? *before : *after); };
  double anchor = static_cast<double>(static_cast<C>(s->max));
  if (s->count == 0) {
    const double sample = static_cast<double>(max_of<C>(x, n < kSample ? n : kSample));
    anchor = sample > anchor ? sample : anchor;
  }
  Sums<C> sums;
  if (kReach<C> > 0.0 && e == nullptr && anchor != -INFINITY) {
    // The maxima come with the sums; in the rare case that they tell of a better anchor, the
    // segment is still in the cache.
    sides.sweep_both(metrics, static_cast<C>(anchor), e, &sums, before, after);
    const double better = reached<C>(anchor, highest());
    if (better != anchor) {
      anchor = better;
      sums = Sums<C>();
      sides.sweep_both(metrics, static_cast<C>(anchor), e, &sums, before, after);
    }
  } else {
    // The maxima come first where e may be x, which is then swept once only, where nothing but
    // masked logits was seen, and where the anchor is to be the maximum.
    sides.maxima(before, after);
    anchor = reached<C>(anchor, highest());
    // Any number will do as anchor where everything is masked, or NaN.
    const C m = anchor == -INFINITY ? C(0) : static_cast<C>(anchor);
    sides.sweep_both(metrics, m, e, &sums, before, after);
  }
  const double factor = anchor == -INFINITY ? 1.0 : move_anchor(anchor, s);
  s->rest += sums.rest.total();
  if (metrics) {
    s->rest_z += sums.rest_z.total();
    s->rest_sq += sums.rest_sq.total();
    s->sum += sums.z.total();
  }
  return factor;
}

// The same with the label; z are the transformed logits, e may be z.
template <typename C, typename X>
static double accumulate_values(const X* z, const Segment& segment, const Folded<C>& f,
                                unsigned metrics, const double* exact_target, X* e, RowStats* s) {
  const int64_t n = segment.n, y = segment.label;
  const bool has_label = y >= 0 && y < n;
  const Pack<C> at_label = has_label ? load_some<C>(z + y, 1, C(0)) : splat(C(0));
  C before, after;
  const double factor =
      accumulate_rest(z, n, y, (metrics & ~unsigned{kIsTop1}) != 0, e, s, &before, &after);
  if (has_label) {
    const C value = first(at_label);
    s->seen = true;
    s->compared = static_cast<double>(value);
    // Nothing stands before the first value: there even -inf, or NaN as in torch, is a maximum.
    s->beaten = (s->count > 0 && !(s->compared > s->highest)) || (y > 0 && !(value > before));
    Pack<C> target = at_label;
    if (exact_target != nullptr) {
      const C b = segment.bias == nullptr ? C(0) : static_cast<const C*>(segment.bias)[y];
      target = f(splat(static_cast<C>(*exact_target) + b));
    }
    s->target = static_cast<double>(first(target));
    s->target_slope = static_cast<double>(first(f.relative_slope(target)));
    s->sum += static_cast<double>(value);
    if (e != nullptr) store_some(splat(C(0)), e + y, 1);
    s->beaten = s->beaten || static_cast<double>(after) > s->compared;
  } else {
    s->beaten = s->beaten || (s->seen && static_cast<double>(before) > s->compared);
  }
  s->count += n;
  const double highest = static_cast<double>(before > after ? before : after);
  s->highest = highest > s->highest ? highest : s->highest;
  return factor;
}

template <typename C>
static double accumulate_as(const Segment& segment, const LogitTransform& transform,
                            unsigned metrics, const double* exact_target, RowStats* s, void* e) {
  const Folded<C> f(transform);
  return with_type<C>(segment.x_type, segment.x, [&](auto* x) {
    auto* typed_e = same_type(x, e);
    if (is_plain(segment, f)) {
      return accumulate_values(x, segment, f, metrics, exact_target, typed_e, s);
    }
    C z[kMaxSegment];
    transform_logits(x, segment, f, z);
    if (e == nullptr) {
      return accumulate_values<C, C>(z, segment, f, metrics, exact_target, nullptr, s);
    }
    C exp_z[kMaxSegment];
    const double factor = accumulate_values(z, segment, f, metrics, exact_target, exp_z, s);
    map2<C>(exp_z, z, typed_e, segment.n, [&](Pack<C> value, Pack<C> at) {
      return f.capped ? value * f.relative_slope(at) : value;
    });
    return factor;
  });
}

static double accumulate(DType compute, const Segment& segment, const LogitTransform& transform,
                         unsigned metrics, const double* exact_target, RowStats* stats, void* e) {
  return compute == DType::f64
             ? accumulate_as<double>(segment, transform, metrics, exact_target, stats, e)
             : accumulate_as<float>(segment, transform, metrics, exact_target, stats, e);
}

}  // namespace FUSEDPO_ISA
}  // namespace fusedpo
