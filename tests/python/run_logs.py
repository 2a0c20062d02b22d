"""Logs of trainings that never ran: what DPO would log if margins developed as told.

Each step draws the margins of its pairs, and every logged number follows from them by DPO's
formulas, so that the series of one log agree with each other as a real run's do.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

Curve = Callable[[float], float]  # of the share of the training that is done


def healthy_margin(done: float) -> float:
    return 2.5 * (1 - np.exp(-3 * done))


def healthy_spread(done: float) -> float:
    return min(1.0, 5 * done)  # the policy begins as its reference


def write_run(folder: pathlib.Path, entries: list[dict[str, Any]]) -> pathlib.Path:
    """Write a trainer_state.json with these entries; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"log_history": entries, "global_step": max(each["step"] for each in entries)}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


def simulate(
    *,
    margin: Curve = healthy_margin,
    spread: Curve = healthy_spread,
    chosen: Curve | None = None,
    beta: float = 0.1,
    reference: float = -120.0,
    steps: int = 100,
    pairs: int = 16,
    held_out_margin: Curve | None = None,
    held_out_spread: Curve | None = None,
    held_out_pairs: int = 200,
) -> list[dict[str, Any]]:
    """Return the entries of a log.

    Args:
        margin, spread: mean and standard deviation of the margins of a step's pairs, in rewards.
        chosen: mean reward of chosen completions; by default 0.4 of the margin.
        reference: log-prob of a completion under the reference, nats.
        held_out_margin, held_out_spread, held_out_pairs: the same of ten evaluations; by default
            margins are 0.9 of the training's, as much spread.
    """
    rng = np.random.default_rng(0)
    chosen = chosen or (lambda done: 0.4 * margin(done))
    held_out = held_out_margin or (lambda done: 0.9 * margin(done))
    held_out_sd = held_out_spread or spread
    entries = []
    for step in range(1, steps + 1):
        done = (step - 1) / (steps - 1)
        noise = rng.normal(0, spread(done), pairs)
        values = _metrics(margin(done) + noise, chosen(done), beta, reference + rng.normal(0, 4))
        learning_rate = 1e-5 * (1 - done)
        norm = float(2 * beta * np.exp(-margin(done) / 2) + 0.01 * rng.random())
        tokens = 4000.0 * step + float(rng.integers(0, 200))
        extra = {"learning_rate": learning_rate, "grad_norm": norm, "num_tokens": tokens}
        entries.append({**values, **extra, "entropy": 1.8 - 0.3 * done, "step": step})
        if step % (steps // 10) == 0:
            # The same pairs each time: the same noise.
            noise = np.random.default_rng(1).normal(0, 1, held_out_pairs) * held_out_sd(done)
            values = _metrics(held_out(done) + noise, chosen(done), beta, reference)
            times = {"eval_runtime": 2.0, "eval_samples_per_second": held_out_pairs / 2}
            named = {f"eval_{name}": value for name, value in values.items()}
            entries.append({**named, **times, "step": step})
    return entries


def _metrics(margins: np.ndarray, chosen: float, beta: float, reference: float) -> dict[str, float]:
    margin = float(margins.mean())
    return {
        "loss": float(np.logaddexp(0, -margins).mean()),
        "rewards/accuracies": float((margins > 0).mean()),
        "rewards/margins": margin,
        "rewards/chosen": chosen,
        "rewards/rejected": chosen - margin,
        "logps/chosen": reference + chosen / beta,
        "logps/rejected": reference + (chosen - margin) / beta,
    }
