"""The history that transformers logs, as one series for each number.

Entries of the training, of evaluations and of the end stand in one list, in the order in which they
were logged.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Series:
    """One logged number over the steps of a run; steps grow, and none comes twice."""

    steps: NDArray[np.int64]  # [n]
    values: NDArray[np.float64]  # [n]; NaN and infinity as they were logged

    def __len__(self) -> int:
        return len(self.steps)


_Values = dict[str, dict[int, float]]  # of one step the last value counts: name -> step -> value


def split(
    file: pathlib.Path, history: Iterable[Any]
) -> tuple[dict[str, Series], dict[str, dict[str, Series]], dict[str, float]]:
    """Return the training's series, those of each evaluated data set by its prefix, and the
    summary of the end.

    Raises:
        ValueError: an entry without a step; `file` is named.
    """
    train: _Values = {}
    evaluations: dict[str, _Values] = {}
    summary: dict[str, float] = {}
    for entry in history:
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise ValueError(f"{file}: an entry of log_history must have a step; got {entry!r:.80}")
        step = entry["step"]
        numbers = {
            name: float(value)
            for name, value in entry.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
        }
        prefix = _evaluation(numbers)
        if "train_runtime" in numbers:
            summary = numbers
        elif prefix is None:
            _add(train, step, numbers)
        else:
            # Of several data sets TRL names its own metrics without the data set's name.
            named = {
                name.removeprefix(f"{prefix}_").removeprefix("eval_"): value
                for name, value in numbers.items()
            }
            _add(evaluations.setdefault(prefix, {}), step, named)
    return _series(train), {name: _series(found) for name, found in evaluations.items()}, summary


def _evaluation(numbers: Mapping[str, float]) -> str | None:
    """The prefix of an evaluation's names: transformers adds a time to each evaluation."""
    for name in numbers:
        if name.endswith("_runtime") and name != "train_runtime":
            return name.removesuffix("_runtime")
    return None


def _add(values: _Values, step: int, numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
        values.setdefault(name, {})[step] = value


def _series(values: _Values) -> dict[str, Series]:
    return {
        name: Series(
            np.array(sorted(by_step), np.int64),
            np.array([by_step[step] for step in sorted(by_step)], np.float64),
        )
        for name, by_step in values.items()
    }
