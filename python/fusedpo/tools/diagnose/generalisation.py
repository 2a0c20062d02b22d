"""Rules about the difference between the training set and held-out pairs."""

from __future__ import annotations

import numpy as np

from .evidence import Case, last
from .findings import Evidence, Finding
from .registry import rule


@rule
def eval_loss_rises(case: Case) -> Finding | None:
    """The loss of held-out pairs ends 5 % above its lowest value, while the training loss fell. One
    that never was below twice its start is a training that diverged, not one that overfits."""
    losses = case.train("loss")
    most = np.inf if case.start_loss is None else 2 * case.start_loss
    for prefix, series in case.evaluations("loss", least=3).items():
        at = int(series.values.argmin())
        lowest, end = float(series.values[at]), float(series.values[-1])
        step, last_step = int(series.steps[at]), int(series.steps[-1])
        if not end > lowest + 0.05 * abs(lowest) or lowest > most:
            continue
        earlier = losses.values[losses.steps <= step]
        if not len(earlier) or last(losses).mean >= earlier[-5:].mean():
            continue
        return Finding(
            "eval_loss_rises",
            "warning",
            f"overfitting: the loss of held-out pairs rises from step {step} on",
            "Training goes on to lower its own loss, and held-out pairs get worse by it.",
            (
                Evidence(f"{prefix}_loss, lowest", lowest, step, step),
                Evidence(f"{prefix}_loss, end", end, last_step, last_step),
                last(losses).evidence("train loss, end"),
            ),
            (
                f"Stop at step {step}: fewer epochs (one is usual), or "
                "load_best_model_at_end=True with EarlyStoppingCallback.",
                "Raise beta, lower learning_rate, or add pairs.",
            ),
        )
    return None


@rule
def train_eval_gap(case: Case) -> Finding | None:
    """The accuracy of the training is 15 points above that of held-out pairs, and by more than two
    standard errors of the latter. Signs of margins below 0.1 are no knowledge yet."""
    if last(case.train("rewards/margins")).mean < 0.1:
        return None
    train = last(case.train("rewards/accuracies"))
    for prefix, series in case.evaluations("rewards/accuracies", least=1).items():
        accuracy, step = float(series.values[-1]), int(series.steps[-1])
        gap = train.mean - accuracy
        if gap < 0.15 or gap < 2 * _error(case, prefix, accuracy):
            continue
        return Finding(
            "train_eval_gap",
            "warning",
            "overfitting: the accuracy of held-out pairs is far below that of training",
            f"{gap:.0%} more of the training's pairs are in the right order than of held-out ones.",
            (
                train.evidence("rewards/accuracies"),
                Evidence(f"{prefix}_rewards/accuracies", accuracy, step, step),
            ),
            (
                "Fewer epochs, a higher beta, a lower learning_rate, or LoRA of a lower rank.",
                "See that both sets are drawn alike: `fusedpo lint` on each.",
            ),
        )
    return None


def _error(case: Case, prefix: str, accuracy: float) -> float:
    """Standard error of an accuracy, from the number of evaluated pairs; 0 where it is unknown."""
    series = case.run.evaluations[prefix]
    if not {"runtime", "samples_per_second"} <= set(series):
        return 0.0
    pairs = series["runtime"].values[-1] * series["samples_per_second"].values[-1]
    return float(np.sqrt(accuracy * (1 - accuracy) / max(pairs, 1.0)))
