"""Rules about a model that does not learn: the loss stays, or only the order of pairs changes."""

from __future__ import annotations

from ..run_facts import loss_names
from .evidence import CannotTell, Case, Window, at_half, last
from .findings import Finding
from .registry import rule

_TARGETED = {"ipo", "ipo_sum", "sppo_hard"}  # their margins stop at a target of their own


@rule
def loss_stuck_at_start(case: Case) -> Finding | None:
    """The loss ends within 2 % of what a policy that is its reference has: ln 2 for sigmoid."""
    if case.start_loss is None:
        raise CannotTell(
            "needs the loss of a policy that is its reference: loss_type of a DPOConfig in "
            "training_args.bin, and no term that depends on the data (sft, use_weighting)"
        )
    loss, margins = last(case.train("loss")), last(case.train("rewards/margins"))
    if abs(loss.mean - case.start_loss) > 0.02 * case.start_loss or abs(margins.mean) > 0.05:
        return None
    evidence = [
        loss.evidence(f"train loss ({case.start_loss:.4g} is a policy that is its reference)"),
        margins.evidence("rewards/margins"),
    ]
    for name in ("rewards/accuracies", "grad_norm", "learning_rate"):
        if (series := case.optional(name)) is not None:
            evidence.append(last(series).evidence(name))
    return Finding(
        "loss_stuck_at_start",
        "error",
        f"the loss is stuck at {case.start_loss:.4g}",
        "The policy still is its reference, or tells chosen from rejected no better than it.",
        tuple(evidence),
        _why_stuck(case, margins),
    )


def _why_stuck(case: Case, margins: Window) -> tuple[str, ...]:
    gradients = case.run.train.get("grad_norm")
    if gradients is not None and not gradients.values.any():
        return (
            "No gradient arrives: look for frozen parameters, an adapter that is not active, or "
            "gradient checkpointing without enable_input_require_grads().",
        )
    if abs(margins.mean) < 1e-6:
        return (
            "Rewards are exactly 0, so no weight moves, or the reference is the same object as "
            "the policy: pass ref_model=None or a copy, and look at learning_rate.",
        )
    return (
        "Raise learning_rate tenfold (usual: 5e-7 to 5e-6 for all weights, 1e-5 to 1e-4 for LoRA).",
        "If margins scatter around 0 at any learning rate, the labels carry no signal: run "
        "`fusedpo lint` on the data, and look at pairs that contradict each other.",
    )


@rule
def accuracy_without_margin(case: Case) -> Finding | None:
    """Four of five pairs are in the right order, by a margin that is below 0.15 and has not grown
    by a quarter in the second half."""
    if set(loss_names(case.run) or ()) & _TARGETED:
        raise CannotTell("is for losses without a target margin, which ipo and sppo_hard have")
    case.needs_reference()
    accuracies, margins = case.train("rewards/accuracies"), case.train("rewards/margins")
    accuracy, margin, before = last(accuracies), last(margins), at_half(margins)
    if accuracy.mean < 0.8 or margin.mean > 0.15 or margin.mean > 1.25 * before.mean:
        return None
    evidence = [
        accuracy.evidence("rewards/accuracies"),
        before.evidence("rewards/margins"),
        margin.evidence("rewards/margins"),
    ]
    fixes = ["Raise learning_rate or train longer; see that the schedule is not at 0 too early."]
    if case.beta is not None and margin.mean / case.beta > 10:
        fixes = [
            f"beta = {case.beta:g} turns {margin.mean / case.beta:.0f} nats into this margin: "
            "raise it towards 0.1."
        ]
    return Finding(
        "accuracy_without_margin",
        "warning",
        "accuracy is high, but margins are flat",
        "Accuracy counts the sign only: pairs are in the right order by a hair, and what the model "
        "writes has hardly changed.",
        tuple(evidence),
        tuple(fixes),
    )
