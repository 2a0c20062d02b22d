"""Pathologies over the checkpoints of a training: a file of generations for each, one table, one
picture."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusedpo.tools.generations import read_generations
from fusedpo.tools.pathologies import PathologyReport, check
from fusedpo.tools.patterns import load_patterns

FILE_NAME = "generations-{step:06d}.jsonl"
_FILE = re.compile(r"generations-(\d+)\.jsonl$")


@dataclass(frozen=True)
class CheckpointReport:
    """One `PathologyReport` for each file, in order; `names` are the steps where the files tell."""

    names: tuple[str, ...]
    reports: tuple[PathologyReport, ...]
    reference: str | None

    def as_dict(self) -> dict[str, Any]:
        checkpoints = [
            {"name": name} | report.as_dict()
            for name, report in zip(self.names, self.reports, strict=True)
        ]
        return {"reference": self.reference, "checkpoints": checkpoints}

    def render(self) -> Any:
        """Return tables for `rich`: counts by checkpoint, and the evidence of the last one."""
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for heading in ("step", "length", *self.reports[0].counts):
            table.add_column(heading, justify="left" if heading == "step" else "right")
        for name, report in zip(self.names, self.reports, strict=True):
            table.add_row(name, f"{report.mean_characters:.0f}", *map(str, report.counts.values()))
        last = self.reports[-1].render()
        return last if len(self.names) == 1 else Group(table, "", last)


def check_files(
    paths: Sequence[str | os.PathLike[str]],
    *,
    reference: str | os.PathLike[str] | None = None,
    patterns: str | os.PathLike[str] | None = None,
) -> CheckpointReport:
    """Look for pathologies in files of generations.

    Args:
        paths: JSONL files; or one folder that a `GenerationCallback` wrote, whose first file, from
            before the training, is the reference if none is named.
        reference: JSONL with the reference model's generations for the same prompts.
        patterns: a file that extends `patterns.yaml`.

    Raises:
        ValueError: no file, or one that holds no generations.
    """
    files = [pathlib.Path(path) for path in paths]
    if len(files) == 1 and files[0].is_dir():
        files = _files_of(files[0])
        before = files[0].name == FILE_NAME.format(step=0)
        reference = files[0] if reference is None and before else reference
    if not files:
        raise ValueError("paths must name at least one file; got none.")
    expected = None if reference is None else read_generations(reference)
    known = load_patterns(patterns)
    return CheckpointReport(
        _names(files),
        tuple(check(read_generations(file), expected, known) for file in files),
        None if reference is None else os.fspath(reference),
    )


def _names(files: Sequence[pathlib.Path]) -> tuple[str, ...]:
    """The steps where the files tell, else their names; with folders where names are the same."""
    steps = [_FILE.search(file.name) for file in files]
    names = [
        file.stem if step is None else str(int(step[1]))
        for file, step in zip(files, steps, strict=True)
    ]
    alike = len(set(names)) < len(names)
    return tuple(str(file.with_suffix("")) for file in files) if alike else tuple(names)


def _files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    found = sorted(path for path in folder.iterdir() if _FILE.search(path.name))
    if not found:
        raise ValueError(f"{folder} must hold files generations-STEP.jsonl; it holds none.")
    return found


def draw(report: CheckpointReport, path: str | os.PathLike[str]) -> None:
    """Draw the share of each pathology and the mean length over the checkpoints; the file's ending
    decides the format."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "fusedpo[plot]"') from error

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    shares, lengths = figure.subplots(1, 2)
    places = range(len(report.names))
    for name in report.reports[0].counts:
        values = [100 * each.share(name) for each in report.reports]
        shares.plot(places, values, marker="o", markersize=4, label=name)
    shares.set_ylabel("completions with it, %")
    shares.set_ylim(bottom=0)
    shares.legend(fontsize="small")
    means = [each.mean_characters for each in report.reports]
    lengths.plot(places, means, marker="o", markersize=4, label="mean")
    reference = report.reports[-1].reference_characters
    if reference is not None:
        means.append(reference)
        lengths.axhline(reference, linestyle="--", color="0.5", label="the reference's mean")
    lengths.set_ylabel("length, characters")
    lengths.set_ylim(0, max(1.0, 1.1 * max(means)))  # all may be empty
    lengths.legend(fontsize="small", loc="lower left")
    for axes in (shares, lengths):
        axes.set_xlabel("checkpoint")
        axes.set_xticks(places, report.names)
        axes.grid(alpha=0.3)
    figure.savefig(os.fspath(path), dpi=110)
