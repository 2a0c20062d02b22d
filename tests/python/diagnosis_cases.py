"""For each rule of `fusedpo diagnose` a log that is made to trigger it, and one that only comes
close."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from fusedpo.tools.pair_scores import PairScores
from run_logs import healthy_margin, simulate

Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class Log:
    entries: Entries
    beta: float = 0.1
    pairs: PairScores | None = None


@dataclass(frozen=True)
class Seeded:
    """`along` are the rules that see the same fault from another side."""

    faulty: Log
    clean: Log
    along: frozenset[str] = frozenset()


def slowly(done: float) -> float:
    return 0.25 * done


def hair_breadth(done: float) -> float:
    return min(0.08, 0.4 * done)


def up_and_down(done: float) -> float:
    return 5 * done if done < 0.4 else 2 - 7 * (done - 0.4)


def with_values(entries: Entries, name: str, value: float, steps: set[int]) -> Entries:
    """The entries with another value of the training in some steps."""
    return [
        each | {name: value} if name in each and each["step"] in steps else each for each in entries
    ]


def pair_scores(by_length: float, count: int = 200) -> PairScores:
    """Margins of which each token that chosen is longer by adds `by_length`."""
    rng = np.random.default_rng(2)
    chosen, rejected = rng.integers(50, 150, (2, count))
    margins = rng.normal(1.0, 1.0, count) + by_length * (chosen - rejected)
    return PairScores(margins, chosen, rejected)


CASES = {
    "loss_stuck_at_start": Seeded(
        Log(simulate(margin=lambda done: 0.0, spread=lambda done: 0.05)),
        Log(simulate(margin=slowly, spread=lambda done: 0.3)),
    ),
    "accuracy_without_margin": Seeded(
        Log(simulate(margin=hair_breadth, spread=lambda done: 0.05)),
        # As small, but still growing.
        Log(simulate(margin=lambda done: 0.14 * done, spread=lambda done: 0.05)),
    ),
    "chosen_logps_fall": Seeded(
        Log(simulate(chosen=lambda done: -0.6 * healthy_margin(done))),
        Log(simulate(chosen=lambda done: -0.05 * healthy_margin(done))),
    ),
    "beta_too_low": Seeded(
        Log(simulate(beta=0.01), beta=0.01),
        Log(simulate(beta=0.03), beta=0.03),
    ),
    "beta_too_high": Seeded(
        Log(simulate(beta=5.0, margin=lambda done: 2 * healthy_margin(done)), beta=5.0),
        # The same margin between completions of one token, which it turns around.
        Log(
            simulate(beta=5.0, margin=lambda done: 2 * healthy_margin(done), reference=-3.0),
            beta=5.0,
        ),
    ),
    "not_finite": Seeded(
        Log(with_values(simulate(), "rewards/margins", float("nan"), set(range(61, 101)))),
        # fp16 looks for its loss scale: steps are skipped, several in a row at the start.
        Log(with_values(simulate(), "grad_norm", float("inf"), {1, 2, 3, 30, 100})),
    ),
    "loss_rises": Seeded(
        Log(simulate(margin=up_and_down)),
        # Noisy steps of few pairs.
        Log(simulate(margin=slowly, spread=lambda done: 2.0, pairs=4)),
        along=frozenset({"chosen_logps_fall", "eval_loss_rises"}),
    ),
    "eval_loss_rises": Seeded(
        Log(simulate(held_out_spread=lambda done: 0.5 + 6 * done)),
        Log(simulate(held_out_margin=lambda done: min(1.0, 3 * done) - 0.05 * done)),
        along=frozenset({"train_eval_gap"}),
    ),
    "train_eval_gap": Seeded(
        Log(simulate(held_out_margin=lambda done: 0.1, held_out_spread=lambda done: 0.3)),
        # As large a gap, of too few pairs to say.
        Log(simulate(held_out_margin=lambda done: 0.5, held_out_pairs=8)),
    ),
    "length_exploitation": Seeded(
        Log(simulate(), pairs=pair_scores(0.05)),
        Log(simulate(), pairs=pair_scores(0.005)),
    ),
}
