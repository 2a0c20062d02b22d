"""Lengths of a data set, and how much chosen and rejected differ in length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Mean, median, 95th percentile and maximum of one column."""

    mean: float
    median: float
    p95: float
    max: int


@dataclass(frozen=True)
class LengthBias:
    """How chosen and rejected differ in length. Pairs with an empty side do not count.

    Attributes:
        pairs: how many were compared.
        ratio: geometric mean of chosen's length over rejected's.
        chosen_longer, rejected_longer: shares of the pairs.
        effect_size: Cohen's d of paired samples: mean of log(chosen / rejected) over its standard
            deviation. 0.2 is called small, 0.5 medium, 0.8 large.
    """

    pairs: int
    ratio: float
    chosen_longer: float
    rejected_longer: float
    effect_size: float


@dataclass(frozen=True)
class Lengths:
    """Lengths in one unit, "words" or "tokens": a summary by column, and the bias of pairs."""

    unit: str
    columns: Mapping[str, Summary]
    bias: LengthBias | None


def summarise(unit: str, columns: Mapping[str, np.ndarray]) -> Lengths:
    """Return the statistics of columns [rows] of lengths; with chosen and rejected, of the bias."""
    bias = None
    if "chosen" in columns and "rejected" in columns:
        bias = length_bias(columns["chosen"], columns["rejected"])
    return Lengths(unit, {name: _summary(column) for name, column in columns.items()}, bias)


def length_bias(chosen: np.ndarray, rejected: np.ndarray) -> LengthBias:
    """Compare lengths [pairs] of both sides.

    Example:
        >>> import numpy as np
        >>> length_bias(np.array([4, 8, 2]), np.array([2, 2, 2])).chosen_longer
        0.6666666666666666
    """
    both = (chosen > 0) & (rejected > 0)
    chosen, rejected = chosen[both], rejected[both]
    pairs = len(chosen)
    if not pairs:
        return LengthBias(0, 1.0, 0.0, 0.0, 0.0)
    logs = np.log(chosen / rejected)
    spread = float(logs.std(ddof=1)) if pairs > 1 else 0.0
    return LengthBias(
        pairs=pairs,
        ratio=float(np.exp(logs.mean())),
        chosen_longer=float((chosen > rejected).mean()),
        rejected_longer=float((rejected > chosen).mean()),
        # A spread of nothing but rounding: every pair has the same ratio, and no d.
        effect_size=float(logs.mean()) / spread if spread > 1e-9 else 0.0,
    )


def _summary(column: np.ndarray) -> Summary:
    if not len(column):
        return Summary(0.0, 0.0, 0.0, 0)
    median, p95 = np.quantile(column, (0.5, 0.95))
    return Summary(float(column.mean()), float(median), float(p95), int(column.max()))
