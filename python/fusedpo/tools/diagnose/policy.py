"""Rules about how far the policy has gone from its reference, and in which direction."""

from __future__ import annotations

from typing import NamedTuple

from .evidence import Case, Window, differ, first, last
from .findings import Evidence, Finding
from .registry import rule


@rule
def chosen_logps_fall(case: Case) -> Finding | None:
    """Likelihood displacement: the margin grows, while chosen completions become less likely, by
    more than noise and by a fifth of what the margin gains."""
    chosen, margins = case.train("rewards/chosen"), case.train("rewards/margins")
    # A policy begins as its reference, where it has one: all rewards are 0 then.
    begin = Window(0.0, 0.0, 0, 0)
    before = begin if case.has_reference else first(chosen)
    gain = last(margins).mean - (begin if case.has_reference else first(margins)).mean
    after = last(chosen)
    fall = before.mean - after.mean
    if gain <= 0 or fall < 0.2 * max(gain, 0.5) or not differ(before, after):
        return None
    evidence = [before.evidence("rewards/chosen, start"), after.evidence("rewards/chosen, end")]
    for name in ("rewards/rejected", "logps/chosen"):
        if (series := case.optional(name)) is not None:
            evidence += [
                first(series).evidence(f"{name}, first steps"),
                last(series).evidence(f"{name}, end"),
            ]
    return Finding(
        "chosen_logps_fall",
        "error" if fall > gain else "warning",
        "log-probs of chosen completions fall (likelihood displacement)",
        f"The margin has grown by {gain:.3g}, while the reward of chosen completions fell by "
        f"{fall:.3g}: rejected ones only fell faster. The probability went to other texts.",
        tuple(evidence),
        (
            "Add the likelihood of chosen: loss_type=['sigmoid', 'sft'], loss_weights=[1, 0.2]; or "
            "take nca_pair or apo_zero, which hold it up.",
            "Raise beta, or lower learning_rate.",
            "Drop pairs that are nearly identical: `fusedpo lint` lists them.",
        ),
    )


@rule
def beta_too_low(case: Case) -> Finding | None:
    """The log-probs of completions have moved by half of what they are under the reference."""
    move = _move(case)
    if move.share < 0.5:
        return None
    return Finding(
        "beta_too_low",
        "warning",
        f"the policy is far from its reference: beta = {move.beta:g} is too low, or learning_rate "
        "too high",
        f"Log-probs of completions moved by {move.share:.0%} of the reference's. Fluency and "
        "knowledge that no pair shows are likely to suffer.",
        move.evidence(),
        (
            f"Raise beta 3 to 10 times (to {3 * move.beta:g} or more).",
            "Lower learning_rate, or train fewer epochs.",
            "Read what the model writes before you use it: `fusedpo generate`.",
        ),
    )


@rule
def beta_too_high(case: Case) -> Finding | None:
    """The loss is satisfied (margins of 3 and more), though chosen and rejected differ by less than
    a twentieth of their log-probs."""
    move = _move(case)
    margin = last(case.train("rewards/margins"))
    if margin.mean < 3 or margin.mean / move.beta > 0.05 * move.reference:
        return None
    nats = margin.mean / move.beta
    return Finding(
        "beta_too_high",
        "warning",
        f"the loss is satisfied before the policy has moved: beta = {move.beta:g} is too high",
        f"A margin of {margin.mean:.3g} is {nats:.2g} nats between completions of about "
        f"{move.reference:.3g} nats. The loss asks for no more, and what the model writes has "
        "hardly changed.",
        (margin.evidence("rewards/margins"), *move.evidence()),
        (f"Lower beta 3 to 10 times (to {move.beta / 3:.2g} or less; 0.1 is usual).",),
    )


class _Move(NamedTuple):
    """How far log-probs of completions went from the reference's, in nats, means of both sides."""

    beta: float
    moved: float
    reference: float  # |log-prob| of a completion under the reference
    window: Window

    @property
    def share(self) -> float:
        return self.moved / self.reference

    def evidence(self) -> tuple[Evidence, ...]:
        steps = self.window.first_step, self.window.last_step
        return (
            Evidence("log-prob of a completion under the reference, nats", -self.reference, *steps),
            Evidence("distance of the policy's from it, nats", self.moved, *steps),
        )


def _move(case: Case) -> _Move:
    beta = case.needs_beta()
    moved = reference = 0.0
    for side in ("chosen", "rejected"):
        ratio = last(case.train(f"rewards/{side}")).mean / beta
        moved += abs(ratio) / 2
        reference += abs(last(case.train(f"logps/{side}")).mean - ratio) / 2
    # Completions that the reference is sure of have log-probs near 0; no share is meant of those.
    return _Move(beta, moved, max(reference, 1e-3), last(case.train("rewards/chosen")))
