// What becomes of a row's sums when their anchor moves and when two stretches of a row meet. In
// fp64; everything has internal linkage, see core/numeric.h.
#pragma once

#include <math.h>

#include "core/logit_row.h"

namespace fusedpo {

// Moves the anchor to `anchor` and returns exp(old - new), by which whatever is in units of
// exp(-anchor) must be multiplied.
static inline double move_anchor(double anchor, RowStats* s) {
  if (anchor == s->max) return 1.0;
  const double shift = s->max - anchor;
  const double factor = exp(shift);
  if (s->rest != 0.0) s->rest_z = factor * (s->rest_z + s->rest * shift);
  s->rest *= factor;
  s->rest_sq *= factor * factor;
  s->max = anchor;
  return factor;
}

// `row` becomes what it would be had it seen the columns of `later` after its own. Sums of a row
// are formed over stretches of fixed width, so they do not depend on who summed which.
static inline void append(RowStats later, RowStats* row) {
  if (later.seen) {
    row->beaten = later.beaten || (row->count > 0 && !(later.compared > row->highest));
    row->seen = true;
    row->compared = later.compared;
    row->target = later.target;
    row->target_slope = later.target_slope;
  } else if (row->seen) {
    row->beaten = row->beaten || later.highest > row->compared;
  }
  const double anchor = later.max > row->max ? later.max : row->max;
  if (anchor != -INFINITY) {  // else nothing but masked logits: no anchor yet, no mass
    move_anchor(anchor, &later);
    move_anchor(anchor, row);
  }
  row->rest += later.rest;
  row->rest_z += later.rest_z;
  row->rest_sq += later.rest_sq;
  row->sum += later.sum;
  row->count += later.count;
  row->highest = later.highest > row->highest ? later.highest : row->highest;
}

// Moves the anchor of a complete row to its largest logit, where results lose nothing to
// cancellation however far away the anchor was that the sums were formed with.
static inline void settle(RowStats* s) {
  const double max = s->target > s->highest ? s->target : s->highest;
  if (max != -INFINITY) move_anchor(max, s);
}

}  // namespace fusedpo
