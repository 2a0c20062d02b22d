"""What a training ends with: the numbers that tell whether it worked, and what it cost."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedpo.tools.train.kl import LIMIT, NOT_FINITE, KLEstimate
from fusedpo.tools.train.memory import MemoryEstimate

FILE = "report.json"
_ACCURACY, _MARGIN = "rewards/accuracies", "rewards/margins"


@dataclass(frozen=True)
class TrainReport:
    """A training that is over.

    Attributes:
        strategy, model: as configured.
        output_dir: the run's folder: the model, trainer_state.json, report.json, report.md, plot.
        model_dir: the folder that loads as the trained model, or as an adapter on `model`.
        metrics: numbers by TRL's names: `train_loss`, `train_runtime`, ..., and after an evaluation
            `eval_loss`, `eval_rewards/accuracies`, `eval_rewards/margins`, ...; without one the
            last step's, as `train_rewards/accuracies`, ....
        kl: KL(policy || reference) on the held-out prompts; or why there is no estimate.
        tokens_per_second: of the training, prompts included; None where TRL does not count them.
        peak_memory: bytes; of the CUDA device, or what the process came to hold on top of what it
            held before.
        memory: the estimate that was made before.
        data: how many rows there were, and which could not be read.
        run: the resolved configuration, as `Resolved.as_dict()`.
        plot: the picture's path; None without matplotlib.
        warnings: sentences.
    """

    strategy: str
    model: str
    output_dir: str
    model_dir: str
    metrics: Mapping[str, float]
    kl: KLEstimate | str
    tokens_per_second: float | None
    peak_memory: int
    memory: MemoryEstimate
    data: Mapping[str, Any]
    run: Mapping[str, Any]
    plot: str | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def accuracy(self) -> float | None:
        """Share of pairs whose chosen completion has the higher reward, held out if possible."""
        return self._metric(_ACCURACY)

    @property
    def margin(self) -> float | None:
        """Mean reward of chosen less rejected completions, held out if possible."""
        return self._metric(_MARGIN)

    def _metric(self, name: str) -> float | None:
        found = self.metrics.get(f"eval_{name}")
        return self.metrics.get(f"train_{name}") if found is None else found

    def as_dict(self) -> dict[str, Any]:
        """Return everything in JSON's types; numbers that are none, as null."""
        return {
            "strategy": self.strategy,
            "model": self.model,
            "output_dir": self.output_dir,
            "model_dir": self.model_dir,
            "accuracy": _finite(self.accuracy),
            "margin": _finite(self.margin),
            "metrics": {name: _finite(value) for name, value in self.metrics.items()},
            "kl": None
            if isinstance(self.kl, str)
            else {name: _finite(value) for name, value in self.kl.as_dict().items()},
            "tokens_per_second": self.tokens_per_second,
            "peak_memory": self.peak_memory,
            "memory_estimate": self.memory.as_dict(),
            "data": dict(self.data),
            "plot": self.plot,
            "warnings": list(self.warnings),
            "run": dict(self.run),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return what a person wants to know, as name and value."""
        held_out = "eval_loss" in self.metrics
        side = "held out" if held_out else "last training step"
        found = [
            ("strategy", self.strategy),
            ("model", self.model),
            ("rows", f"{self.data['train_rows']} trained, {self.data['eval_rows']} held out"),
            (
                "loss",
                _told(self._metric("loss")) + f" ({side if held_out else 'mean of all steps'})",
            ),
        ]
        token_accuracy = self._metric("mean_token_accuracy") if self.strategy == "sft" else None
        for name, value in (
            ("accuracy", self.accuracy),
            ("reward margin", self.margin),
            ("accuracy of tokens", token_accuracy),
        ):
            if value is not None:
                found.append((name, f"{value:.4g} ({side})"))
        seconds = self.metrics.get("train_runtime", math.nan)
        speed = self.tokens_per_second
        tokens = "tokens not counted" if speed is None else f"{speed:,.0f} tokens/s"
        estimate = self.memory.total
        kl = f"not estimated: {self.kl}" if isinstance(self.kl, str) else str(self.kl)
        peak = f"{self.peak_memory / 2**20:,.1f} MiB (estimated: {estimate / 2**20:,.1f} MiB)"
        return [
            *found,
            ("KL to the reference", kl),
            ("speed", f"{tokens}, {seconds:.1f} s"),
            ("peak memory", peak),
            ("trained model", self.model_dir),
            ("plot", self.plot or "none"),
        ]

    def render(self) -> Any:
        """Return a rich table, with the warnings below it."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title=self.output_dir, show_header=False)
        for row in self.rows():
            table.add_row(*row)
        return Group(table, *(f"warning: {each}" for each in self.warnings))

    def markdown(self) -> str:
        """Return the report as a page."""
        lines = [f"# {os.path.basename(self.output_dir.rstrip('/'))}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in self.rows()]
        lines += ["", *(f"* {each}" for each in self.warnings)] if self.warnings else []
        if self.plot is not None:
            lines += ["", f"![the training]({os.path.basename(self.plot)})"]
        changed = ", ".join(
            f"`{name}={self.run['arguments'].get(name)}`" for name in self.run["changed"]
        )
        return "\n".join([*lines, "", f"Set: {changed}", ""])

    def write(self) -> None:
        """Write report.md, and then report.json whole: a run that has it is finished."""
        folder = pathlib.Path(self.output_dir)
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        partial = folder / f"{FILE}.partial"
        partial.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / FILE)


def warnings_of(
    metrics: Mapping[str, float], kl: KLEstimate | str, data: Mapping[str, Any]
) -> list[str]:
    """Return what a reader must not miss, a sentence each."""
    found = []
    if isinstance(kl, KLEstimate) and kl.kl > LIMIT:
        found.append(
            f"the KL to the reference is above {LIMIT:g} nats: the policy has left what the "
            "reference would write. Raise beta, or lower learning_rate or num_train_epochs."
        )
    elif NOT_FINITE in kl if isinstance(kl, str) else math.isnan(kl.kl):
        found.append(f"the KL to the reference is no number: {NOT_FINITE}.")
    loss = metrics.get("eval_loss", metrics.get("train_loss", 0.0))
    if not math.isfinite(loss):
        found.append(f"the loss is {loss}: the training has diverged. Lower learning_rate.")
    if data["unreadable_rows"]:
        found.append(
            f"{data['unreadable_rows']} rows could not be read and were left out: "
            f"{'; '.join(data['problems'][:3])}"
        )
    if data["unused_rows"]:
        found.append(f"{data['unused_rows']} rows have no use in this training.")
    if not data["eval_rows"]:
        found.append(
            "nothing was held out: accuracy and margin are those of the last training step, and no "
            "KL was estimated. Set eval_split, e.g. 0.1."
        )
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _told(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
