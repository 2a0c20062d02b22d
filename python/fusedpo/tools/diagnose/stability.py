"""Rules about a training that broke: numbers that are none, and a loss that rises."""

from __future__ import annotations

import numpy as np

from ..log_history import Series
from .evidence import Case, Window, differ, last, windows
from .findings import Evidence, Finding
from .registry import rule


@rule
def not_finite(case: Case) -> Finding | None:
    """A logged value is NaN or infinite. The loss alone tells little: transformers replaces such
    losses by the mean of the others (`logging_nan_inf_filter`)."""
    evidence = []
    for prefix, found in {"": case.run.train, **case.run.evaluations}.items():
        for name, series in found.items():
            bad = _not_finite(name, series)
            if bad.any():
                at = int(series.steps[bad][0])
                label = f"{prefix}_{name}" if prefix else name
                evidence.append(Evidence(label, float(series.values[bad][0]), at, at))
    if not evidence:
        return None
    evidence.sort(key=lambda each: each.first_step)
    return Finding(
        "not_finite",
        "error",
        f"NaN or infinity from step {evidence[0].first_step} on",
        "The weights are lost from there on. Go back to a checkpoint before it.",
        tuple(evidence[:5]),
        (
            "Lower learning_rate, use warm-up, and leave max_grad_norm at 1.",
            "Train in bf16 rather than fp16.",
            "Look for rows without a completion after truncation: `fusedpo lint`.",
        ),
    )


def _not_finite(name: str, series: Series) -> np.ndarray:
    bad = ~np.isfinite(series.values)
    if name == "grad_norm":
        # The loss scale of fp16 is found by trying: steps with an infinite norm are skipped, until
        # one is fine. At the end of a run several of them mean that none will be.
        finite = np.flatnonzero(~bad)
        end = finite[-1] + 1 if finite.size else 0
        if len(bad) - end < 2:
            end = len(bad)
        bad[:end] &= np.isnan(series.values[:end])
    return bad


@rule
def loss_rises(case: Case) -> Finding | None:
    """The loss ends by more than noise above its lowest window, and has lost half of what it had
    gained, or 5 % of its start where it never gained."""
    losses = case.train("loss")
    every = windows(losses)
    if case.start_loss is not None:  # before the first step: a run may diverge in its first window
        every.insert(0, Window(case.start_loss, 0.0, 0, 0))
    end, lowest = last(losses), min(every, key=lambda window: window.mean)
    start = every[0].mean
    least = max(0.5 * (start - lowest.mean), 0.05 * abs(start))
    if end.mean - lowest.mean < least or not differ(end, lowest):
        return None
    what = "train loss, lowest" if lowest.last_step else "loss of a policy that is its reference"
    evidence = [lowest.evidence(what), end.evidence("train loss, end")]
    if "grad_norm" in case.run.train:
        norms = case.run.train["grad_norm"]
        at = int(np.nanargmax(norms.values)) if np.isfinite(norms.values).any() else 0
        step = int(norms.steps[at])
        evidence.append(Evidence("grad_norm, largest", float(norms.values[at]), step, step))
    fixes = [
        "Lower learning_rate by 3 to 10 times, and use warm-up (warmup_steps=0.1).",
        "Raise beta, or the batch (gradient_accumulation_steps), where steps are noisy.",
    ]
    if lowest.last_step:
        fixes.append(f"Take the checkpoint near step {lowest.last_step}.")
    worse = end.mean > start
    return Finding(
        "loss_rises",
        "error" if worse else "warning",
        "the training diverges" if worse else "the training loss rises again",
        "The loss ends above that of an untrained policy."
        if worse
        else "Most of what the loss had gained is lost again.",
        tuple(evidence),
        tuple(fixes),
    )
