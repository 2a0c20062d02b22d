"""What the rules look at: windows of a series, and what is known of the run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..log_history import Series
from ..pair_scores import PairScores
from ..runs import Run
from .findings import Evidence

SHARE = 0.2  # of the logged values are a window
LEAST = 8  # values, for a window to have more than one and a trend to be one


class CannotTell(Exception):
    """A rule lacks what it needs; the message says what, and how to get it."""


@dataclass(frozen=True)
class Case:
    """A run, and what a diagnosis was told besides or found out once for all rules."""

    run: Run
    beta: float | None
    start_loss: float | None
    has_reference: bool
    pairs: PairScores | None

    def train(self, name: str) -> Series:
        """A series of the training that is long enough, without values that are not finite."""
        return self._checked(self.run.train.get(name), name, LEAST, "logging_steps")

    def optional(self, name: str) -> Series | None:
        """As `train`, for what only adds evidence; None where there is too little of it."""
        try:
            return self.train(name)
        except CannotTell:
            return None

    def evaluations(self, name: str, least: int) -> dict[str, Series]:
        """The same series of each evaluated data set."""
        if not self.run.evaluations:
            raise CannotTell("needs evaluations: give an eval_dataset, and eval_strategy='steps'")
        return {
            prefix: self._checked(series.get(name), f"{prefix}_{name}", least, "eval_steps")
            for prefix, series in self.run.evaluations.items()
        }

    def needs_reference(self) -> None:
        if not self.has_reference:
            raise CannotTell("needs rewards that are relative to a reference model, as DPO's are")

    def needs_beta(self) -> float:
        self.needs_reference()
        if self.beta is None:
            raise CannotTell("needs beta, which was not saved with the run; name it: --beta")
        return self.beta

    def _checked(self, series: Series | None, name: str, least: int, option: str) -> Series:
        if series is None:
            raise CannotTell(f"needs {name}, which the run has not logged")
        kept = np.isfinite(series.values)
        if kept.sum() < least:
            raise CannotTell(
                f"needs {least} values; got {int(kept.sum())}. A smaller {option} logs more"
            )
        return Series(series.steps[kept], series.values[kept])


@dataclass(frozen=True)
class Window:
    """Mean of neighbouring values of a series, its standard error, and the steps they are of."""

    mean: float
    error: float
    first_step: int
    last_step: int

    def evidence(self, what: str) -> Evidence:
        return Evidence(what, self.mean, self.first_step, self.last_step)


def windows(series: Series) -> list[Window]:
    """Every window of SHARE of the values, from the first to the last."""
    size = window_size(series)
    return [_window(series, start, size) for start in range(len(series) - size + 1)]


def first(series: Series) -> Window:
    return _window(series, 0, window_size(series))


def last(series: Series) -> Window:
    size = window_size(series)
    return _window(series, len(series) - size, size)


def at_half(series: Series) -> Window:
    """The window that ends at half of the run."""
    size = window_size(series)
    return _window(series, max(0, len(series) // 2 - size), size)


def window_size(series: Series) -> int:
    return max(2, round(SHARE * len(series))) if len(series) >= LEAST else 1


def _window(series: Series, start: int, size: int) -> Window:
    values, steps = series.values[start : start + size], series.steps[start : start + size]
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Window(float(values.mean()), float(error), int(steps[0]), int(steps[-1]))


def differ(a: Window, b: Window) -> bool:
    """Whether two means are further apart than noise: three standard errors of the difference."""
    return abs(a.mean - b.mean) > 3 * float(np.hypot(a.error, b.error))
