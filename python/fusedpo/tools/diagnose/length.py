"""The rule about margins that follow the lengths of the completions."""

from __future__ import annotations

import numpy as np

from .evidence import CannotTell, Case
from .findings import Evidence, Finding
from .registry import rule

_LEAST_PAIRS = 30


@rule
def length_exploitation(case: Case) -> Finding | None:
    """Margins of pairs correlate by more than 0.5 with chosen minus rejected length, or pairs whose
    chosen completion is the shorter one are right 25 points less often."""
    pairs = case.pairs
    if pairs is None:
        raise CannotTell(
            "needs margins and lengths of single pairs, which no trainer logs: name the data and "
            "the reference (--data, --reference), then the pairs are scored"
        )
    if len(pairs) < _LEAST_PAIRS:
        raise CannotTell(f"needs {_LEAST_PAIRS} pairs; got {len(pairs)}")
    difference = (pairs.chosen_lengths - pairs.rejected_lengths).astype(np.float64)
    if not np.ptp(pairs.margins) > 1e-6 or not np.ptp(difference) > 0:
        raise CannotTell("needs margins and lengths that differ from pair to pair")
    r = float(np.corrcoef(pairs.margins, difference)[0, 1])
    right = pairs.margins > 0
    longer, shorter = right[difference > 0], right[difference < 0]
    gap = float(longer.mean() - shorter.mean()) if len(longer) and len(shorter) else 0.0
    # Fisher's z: three standard errors; and two of the difference of two shares.
    correlated = abs(r) > 0.5 and abs(np.arctanh(min(abs(r), 0.999999))) > 3 / np.sqrt(
        len(pairs) - 3
    )
    error = np.sqrt(0.25 / max(len(longer), 1) + 0.25 / max(len(shorter), 1))
    if not correlated and not (abs(gap) > 0.25 and abs(gap) > 2 * error):
        return None
    step = case.run.last_step
    which = "longer" if (r if correlated else gap) > 0 else "shorter"
    return Finding(
        "length_exploitation",
        "warning",
        f"length exploitation: the model prefers the {which} completion",
        "How much a pair's margin is follows from its lengths, not from its texts alone.",
        (
            Evidence(f"correlation of margin and length, {len(pairs)} pairs", r, step, step),
            *_shares(longer, "longer", step),
            *_shares(shorter, "shorter", step),
            Evidence("mean length, chosen minus rejected, tokens", difference.mean(), step, step),
        ),
        (
            "Take a loss of means per token: loss_type='sigmoid_norm' or 'ipo'; or ld_alpha=0.5.",
            "Balance the data: `fusedpo lint` shows its length bias.",
        ),
    )


def _shares(right: np.ndarray, which: str, step: int) -> tuple[Evidence, ...]:
    if not len(right):
        return ()
    what = f"accuracy of {len(right)} pairs whose chosen completion is {which}"
    return (Evidence(what, float(right.mean()), step, step),)
