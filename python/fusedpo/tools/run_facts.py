"""What a run's loss was, and what follows from it: beta, the value it starts at, the reference."""

from __future__ import annotations

import numpy as np
import torch

import fusedpo

from .runs import Run

LN2 = 0.6931471805599453
_PLAIN = {"reduction", "label_smoothing", "discopop_tau"}  # options that change the start


def loss_names(run: Run) -> tuple[str, ...] | None:
    """The losses that a DPOConfig named; None where none was saved, or for another trainer's."""
    names = run.arguments.get("loss_type") if run.config == "DPOConfig" else None
    if names is None:
        return None
    return (names,) if isinstance(names, str) else tuple(names)


def start_loss(run: Run) -> float | None:
    """The loss of a policy that is its reference; ln 2 for `sigmoid`. None where it depends on the
    data or is not known: without arguments only a run that began at ln 2 is recognised."""
    names = loss_names(run)
    if names is None:
        losses = run.train.get("loss")
        starts_at_ln2 = losses is not None and abs(losses.values[0] - LN2) < 0.05
        return LN2 if starts_at_ln2 and run.config is None else None
    known = fusedpo.loss_types()
    if run.arguments.get("use_weighting") or not set(names) <= set(known) - {"sft"}:
        return None
    taken = {option for name in names for option in known[name].options} & _PLAIN
    options = {name: run.arguments[name] for name in taken if name in run.arguments}
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    result = fusedpo.preference_loss(
        *(zero, zero, zero, zero),
        loss_type=list(names),
        loss_weights=run.arguments.get("loss_weights"),
        beta=run.arguments.get("beta", 0.1),
        chosen_lengths=one,
        rejected_lengths=one,
        **options,
    )
    return result.loss.item()


def has_reference(run: Run) -> bool:
    """Whether the logged rewards are beta (logp - ref_logp), as DPO's and KTO's are.

    Without arguments: whether the first ones are small beside the log-probs, which rewards without
    a reference (CPO, SimPO, ORPO) are not.
    """
    if run.config is not None:
        return run.config in ("DPOConfig", "KTOConfig")
    rewards, logps = run.train.get("rewards/chosen"), run.train.get("logps/chosen")
    if rewards is None or logps is None:
        return False
    return bool(abs(rewards.values[0]) < 0.01 * abs(logps.values[0]))


def find_beta(run: Run) -> float | None:
    """beta from the arguments; else from two evaluations of one data set, where the reference's
    log-probs are constant and rewards change by beta times what log-probs change by; else None."""
    beta = run.arguments.get("beta")
    if isinstance(beta, (int, float)) and beta > 0:
        return float(beta)
    for series in run.evaluations.values():
        if not has_reference(run) or not {"rewards/chosen", "logps/chosen"} <= set(series):
            continue
        rewards, logps = series["rewards/chosen"].values, series["logps/chosen"].values
        if len(rewards) != len(logps) or len(rewards) < 2 or not np.ptp(logps) > 1e-3:
            continue
        slope, offset = np.polyfit(logps, rewards, 1)
        exact = np.abs(slope * logps + offset - rewards).max() < 1e-3 * np.ptp(rewards)
        if exact and slope > 0:
            return float(slope)
    return None
