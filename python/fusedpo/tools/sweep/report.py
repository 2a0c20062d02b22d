"""The table and the picture that a sweep ends with."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HEADINGS = ("loss", "beta", "eval loss", "accuracy", "margin", "KL", "tokens/s", "seconds")


@dataclass(frozen=True)
class SweepRun:
    """One training of a sweep.

    Attributes:
        name: of its folder.
        loss, beta: what it was trained with; beta is None where the configuration's default served.
        folder: with the model and everything else.
        reused: it was finished before, and not repeated.
        report: what `TrainReport.as_dict` returned.
    """

    name: str
    loss: str
    beta: float | None
    folder: str
    reused: bool
    report: Mapping[str, Any]

    def row(self) -> tuple[str, ...]:
        """Return the cells under HEADINGS."""
        metrics, kl = self.report["metrics"], self.report["kl"]
        beta = self.report["run"]["arguments"]["beta"]
        return (
            self.loss,
            f"{beta:g}",
            _told(metrics.get("eval_loss")),
            _told(self.report["accuracy"]),
            _told(self.report["margin"]),
            "" if kl is None else f"{_told(kl['kl'])} ± {_told(kl['standard_error'], '.2g')}",
            _told(self.report["tokens_per_second"], ",.0f"),
            _told(metrics["train_runtime"], ".1f"),
        )


@dataclass(frozen=True)
class SweepReport:
    """A sweep that is over.

    Attributes:
        output_dir: the sweep's folder.
        ref_store: what all runs with a reference looked it up in; None where there was no such run.
        runs: in the order in which they were asked for.
        plot: the overlay of all runs; None without matplotlib.
    """

    output_dir: str
    ref_store: str | None
    runs: tuple[SweepRun, ...]
    plot: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return everything in JSON's types."""
        return {
            "output_dir": self.output_dir,
            "ref_store": self.ref_store,
            "plot": self.plot,
            "runs": [
                {
                    "name": run.name,
                    "loss": run.loss,
                    "beta": run.report["run"]["arguments"]["beta"],
                    "folder": run.folder,
                    "reused": run.reused,
                    "eval_loss": run.report["metrics"].get("eval_loss"),
                    "accuracy": run.report["accuracy"],
                    "margin": run.report["margin"],
                    "kl": run.report["kl"],
                    "tokens_per_second": run.report["tokens_per_second"],
                    "warnings": run.report["warnings"],
                }
                for run in self.runs
            ],
        }

    def render(self) -> Any:
        """Return a rich table, with what the runs warn of below it."""
        from rich.console import Group
        from rich.table import Table

        table = Table(*HEADINGS, title=self.output_dir)
        for run in self.runs:
            table.add_row(*run.row())
        reused = sum(run.reused for run in self.runs)
        lines = [f"{len(self.runs) - reused} runs trained, {reused} were finished before"]
        lines += [f"reference store: {self.ref_store}"] if self.ref_store else []
        lines += [f"plot: {self.plot}"] if self.plot else []
        return Group(table, *lines, *self._warnings())

    def _warnings(self) -> list[str]:
        """Each sentence once, with the runs that it is about."""
        runs: dict[str, list[str]] = {}
        for run in self.runs:
            for sentence in run.report["warnings"]:
                runs.setdefault(sentence, []).append(run.name)
        return [f"{', '.join(names)}: {sentence}" for sentence, names in runs.items()]

    def markdown(self) -> str:
        """Return the table as a page."""
        lines = [f"# {os.path.basename(self.output_dir.rstrip('/'))}", ""]
        lines += ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
        lines += ["| " + " | ".join(run.row()) + " |" for run in self.runs]
        lines += ["", *(f"* {each}" for each in self._warnings())] if self._warnings() else []
        if self.plot is not None:
            lines += ["", f"![all runs]({os.path.basename(self.plot)})"]
        return "\n".join([*lines, ""])

    def write(self) -> None:
        """Write sweep.json and sweep.md into the sweep's folder."""
        folder = pathlib.Path(self.output_dir)
        text = json.dumps(self.as_dict(), indent=2) + "\n"
        (folder / "sweep.json").write_text(text, encoding="utf-8")
        (folder / "sweep.md").write_text(self.markdown(), encoding="utf-8")


def _told(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)
