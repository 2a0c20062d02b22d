"""What became of the policy over the rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fusedpo.tools.pairs import PairsReport
from fusedpo.tools.pathologies import PathologyReport


@dataclass(frozen=True)
class Round:
    """One round: what the policy wrote at its beginning, and what it was taught with that.

    Attributes:
        number: from 1; the one after the last training has samples alone, so that its effect shows.
        tokens: mean number of tokens of a sample.
        pathologies: of the samples; verbosity is relative to the first round's.
        pairs, beta, learning_rate, metrics: None where nothing was trained; beta and learning_rate
            also where they are the configuration's.
    """

    number: int
    tokens: float
    pathologies: PathologyReport
    pairs: PairsReport | None = None
    beta: float | None = None
    learning_rate: float | None = None
    metrics: Mapping[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        pathologies = self.pathologies.as_dict()
        del pathologies["findings"]  # thousands of them; `fusedpo generate` and `check` have them
        return {
            **asdict(self),
            "pairs": None if self.pairs is None else self.pairs.as_dict(),
            "pathologies": pathologies,
        }


@dataclass(frozen=True)
class IterateReport:
    """All rounds, and where the last policy is."""

    output: str
    model: str  # the last round's
    rounds: tuple[Round, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "model": self.model,
            "rounds": [each.as_dict() for each in self.rounds],
        }

    def render(self) -> Any:
        """Return a table for `rich`: a column for each round, that of what it began with first."""
        from rich.table import Table

        table = Table(title=f"{self.output}: the policy is {self.model}", title_justify="left")
        table.add_column("round")
        for each in self.rounds:
            table.add_column(str(each.number), justify="right")
        for name, cell in _rows(list(self.rounds[0].pathologies.counts)).items():
            table.add_row(name, *map(cell, self.rounds))
        return table


def _rows(checks: Sequence[str]) -> dict[str, Callable[[Round], str]]:
    """What is shown of a round, by name; nothing of its training where it has none."""
    samples: dict[str, Callable[[Round], str]] = {
        "samples": lambda each: str(each.pathologies.completions),
        "characters": lambda each: f"{each.pathologies.mean_characters:.0f}",
        "times round 1": lambda each: _number(each.pathologies.length_ratio, ".2f"),
        "tokens": lambda each: f"{each.tokens:.0f}",
        "cut": lambda each: str(each.pathologies.truncated),
    }
    counts = {check: _count(check) for check in checks}
    training: dict[str, Callable[[Round], str]] = {
        "pairs": lambda each: "" if each.pairs is None else str(each.pairs.pairs),
        "longer chosen": lambda each: _of_pairs(each, "longer_chosen"),
        "flip rate": lambda each: _of_pairs(each, "flip_rate"),
        "beta": lambda each: _number(each.beta, "g"),
        "learning rate": lambda each: _number(each.learning_rate, "g"),
        "loss": lambda each: "" if each.metrics is None else f"{each.metrics['train_loss']:.3f}",
    }
    return samples | counts | training


def _count(check: str) -> Callable[[Round], str]:
    return lambda each: str(each.pathologies.counts[check])


def _of_pairs(each: Round, share: str) -> str:
    return "" if each.pairs is None else _number(getattr(each.pairs, share), ".1%")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
