"""Counts of outcomes, the win rate with its interval, and what length had to do with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .comparison import Comparison, Outcome

LEVEL = 0.95
_CHUNK = 256  # resamples at a time: bounds the memory to this many rows of prompts


class Interval(NamedTuple):
    """The middle 95 % of what resampling the prompts gives."""

    low: float
    high: float


class Lengths(NamedTuple):
    """Lengths in characters. None where there is nothing to average."""

    a: float  # mean over all comparisons
    b: float
    winners: float | None  # mean over the decided comparisons
    losers: float | None
    longer_won: float | None  # share, of the decided ones whose answers differ in length


# Of a comparison in which both replies could be read, for `a`.
SCORE: dict[Outcome, float] = {
    "win": 1.0,
    "loss": 0.0,
    "tie": 0.5,
    "half": 0.5,
    "flip": 0.5,
    "identical": 0.5,
}


def scored(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Those whose replies could be read."""
    return [each for each in comparisons if each.outcome in SCORE]


def win_rate(comparisons: Sequence[Comparison]) -> float | None:
    """Wins and half the ties, over the comparisons that could be read; None without any."""
    scores = [SCORE[each.outcome] for each in scored(comparisons)]
    return float(np.mean(scores)) if scores else None


def flip_rate(comparisons: Sequence[Comparison]) -> float | None:
    """Flips over the comparisons that were asked and could be read; None without any."""
    counts = Counter(each.outcome for each in scored(comparisons))
    asked = counts.total() - counts["identical"]
    return counts["flip"] / asked if asked else None


def bootstrap(comparisons: Sequence[Comparison], *, resamples: int, seed: int) -> Interval | None:
    """The win rate's interval, from `resamples` draws of the prompts with replacement.

    Prompts are drawn and not comparisons: several answers to one prompt are not independent.
    None where fewer than two prompts have a comparison that could be read.
    """
    sums: dict[str, list[float]] = {}
    for each in scored(comparisons):
        sums.setdefault(each.question.prompt, []).append(SCORE[each.outcome])
    if len(sums) < 2:
        return None
    total = np.array([sum(scores) for scores in sums.values()])  # [prompts]
    count = np.array([len(scores) for scores in sums.values()], dtype=float)
    generator = np.random.default_rng(seed)
    rates: list[NDArray[np.float64]] = []
    for start in range(0, resamples, _CHUNK):
        size = (min(_CHUNK, resamples - start), len(sums))
        drawn = generator.integers(0, len(sums), size=size)
        rates.append(total[drawn].sum(axis=1) / count[drawn].sum(axis=1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(rates), [tail, 1 - tail])
    return Interval(float(low), float(high))


def lengths(comparisons: Sequence[Comparison]) -> Lengths:
    """How long the answers are, and whether the longer ones win; at least one comparison."""
    winners, losers = [], []
    for each in comparisons:
        a, b = len(each.question.a), len(each.question.b)
        if each.outcome == "win":
            winners.append(a)
            losers.append(b)
        elif each.outcome == "loss":
            winners.append(b)
            losers.append(a)
    differing = [(w, x) for w, x in zip(winners, losers, strict=True) if w != x]
    return Lengths(
        a=float(np.mean([len(each.question.a) for each in comparisons])),
        b=float(np.mean([len(each.question.b) for each in comparisons])),
        winners=float(np.mean(winners)) if winners else None,
        losers=float(np.mean(losers)) if losers else None,
        longer_won=float(np.mean([w > x for w, x in differing])) if differing else None,
    )
