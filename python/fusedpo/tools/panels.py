"""What a plot of runs has panels for, and the series of a run that go into each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .log_history import Series
from .run_facts import start_loss
from .runs import Run, tokens_per_step

CHOSEN, REJECTED = "chosen", "rejected"


@dataclass(frozen=True)
class Panel:
    """A title, the unit of its axis, and which series of a run belong into it, by what they are
    called in the legend ("" where there is one)."""

    title: str
    unit: str
    names: Mapping[str, str]
    level: Callable[[Run], float | None] = lambda run: None  # a dotted line

    def train(self, run: Run) -> dict[str, Series]:
        return {label: run.train[name] for label, name in self.names.items() if name in run.train}

    def evaluations(self, run: Run) -> list[dict[str, Series]]:
        return [
            {label: found[name] for label, name in self.names.items() if name in found}
            for found in run.evaluations.values()
        ]


class _Lengths(Panel):
    """Trainers that sample completions log their lengths; DPO's logs the tokens of all batches."""

    def train(self, run: Run) -> dict[str, Series]:
        logged = super().train(run)
        tokens = tokens_per_step(run)
        return logged if logged or tokens is None else {"": tokens}


def _sides(name: str) -> dict[str, str]:
    return {side: f"{name}/{side}" for side in (CHOSEN, REJECTED)}


PANELS = (
    Panel("loss", "", {"": "loss"}, start_loss),
    Panel("accuracy", "share of pairs", {"": "rewards/accuracies"}, lambda run: 0.5),
    Panel("margin", "reward", {"": "rewards/margins"}, lambda run: 0.0),
    Panel("rewards", "reward", _sides("rewards"), lambda run: 0.0),
    Panel("log-probabilities", "nats per completion", _sides("logps")),
    Panel("entropy", "nats per token", {"": "entropy"}),
    _Lengths("length", "tokens per step", {"": "completions/mean_length"}),
    Panel("gradient norm", "", {"": "grad_norm"}),
)
