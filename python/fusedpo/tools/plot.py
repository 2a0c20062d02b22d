"""`plot`: the curves of one or several runs in one picture."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .log_history import Series
from .panels import CHOSEN, PANELS, REJECTED, Panel
from .runs import Run, read_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
# Okabe and Ito's colours, which people who see fewer colours tell apart, too; yellow left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", (0, (5, 1)), (0, (1, 1)))  # of further runs, when the colours are used up
_COLUMNS = 4
_SMOOTH_FROM = 60  # logged values; shorter series are drawn as they are


@dataclass(frozen=True)
class PlotReport:
    """What was drawn: the file, the runs, and the titles of the panels."""

    path: str
    runs: tuple[str, ...]
    panels: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"path": self.path, "runs": list(self.runs), "panels": list(self.panels)}

    def render(self) -> str:
        """One line for people."""
        return f"{self.path}: {', '.join(self.panels)} of {', '.join(self.runs)}"


def plot(
    runs: Sequence[str | os.PathLike[str] | Run], output: str | os.PathLike[str]
) -> PlotReport:
    """Draw what runs logged: loss, accuracy, margin, rewards, log-probs, entropy, length, gradient.

    A panel is drawn for what at least one run has logged. Lines are the training's values (means
    over windows, with the values themselves faint behind them, where there are many), dots with
    lines are evaluations.

    Args:
        runs: folders, checkpoints or trainer_state.json files of any trainer of TRL, or what
            `fusedpo.tools.runs.read_run` returned.
        output: a .png or .svg file; its folder is made.

    Raises:
        ValueError: another kind of file; no run; a run without any of the series; names twice.
        FileNotFoundError: a run that is not there.
        ImportError: matplotlib is missing.

    Example:

        plot(["dpo_beta_0.1", "dpo_beta_0.5"], "runs.png")
    """
    path = pathlib.Path(output)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"a plot is written to {' or '.join(FORMATS)}; got {path.name}")
    read = _read(runs)
    panels = [panel for panel in PANELS if any(_has(panel, run) for run in read)]
    for run in read:
        if not any(_has(panel, run) for panel in panels):
            raise ValueError(
                f"{run.path} must have logged one of loss, rewards/..., logps/..., entropy, "
                f"num_tokens, grad_norm; got {', '.join(sorted(run.train)) or 'none'}"
            )
    figure = _draw(read, panels)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return PlotReport(
        str(path), tuple(run.name for run in read), tuple(panel.title for panel in panels)
    )


def _read(runs: Sequence[str | os.PathLike[str] | Run]) -> list[Run]:
    if isinstance(runs, (str, os.PathLike, Run)):
        raise TypeError(f"runs must be a list; got {type(runs).__name__}. Write [run]")
    paths = [run for run in runs if not isinstance(run, Run)]
    from_paths = iter(read_runs(paths) if paths or not runs else [])
    read = [run if isinstance(run, Run) else next(from_paths) for run in runs]
    names = [run.name for run in read]
    if len(set(names)) < len(names):
        raise ValueError(f"runs must have different names; got {', '.join(names)}")
    return read


def _has(panel: Panel, run: Run) -> bool:
    return bool(panel.train(run)) or any(panel.evaluations(run))


# Drawing -----------------------------------------------------------------------------------------


def _draw(runs: Sequence[Run], panels: Sequence[Panel]) -> Figure:
    try:
        # Figure by itself: pyplot would choose a backend and keep figures for the whole process.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('fusedpo plot needs matplotlib: pip install "fusedpo[plot]"') from error
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.7 * columns, 2.7 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, runs)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    _legend(figure, runs)
    return figure


def _draw_panel(axis: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    for index, run in enumerate(runs):
        for label, series in panel.train(run).items():
            _draw_train(axis, series, _look(index, label, len(runs)))
        for found in panel.evaluations(run):
            for label, series in found.items():
                look = _look(index, label, len(runs)) | {"linewidth": 1.0, "alpha": 0.8}
                kept = np.isfinite(series.values)
                axis.plot(series.steps[kept], series.values[kept], "o", markersize=4, **look)
    levels = {panel.level(run) for run in runs}
    if len(levels) == 1 and (level := levels.pop()) is not None:
        axis.axhline(level, color="0.55", linewidth=0.9, linestyle=":", zorder=0)
    axis.set_title(panel.title, fontsize=10.5, loc="left", fontweight="bold")
    axis.set_title(panel.unit, fontsize=8.5, loc="right", color="0.4")
    axis.set_xlabel("step", fontsize=8.5, color="0.4")
    axis.tick_params(labelsize=8, color="0.6", labelcolor="0.25")
    axis.grid(color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("0.6")
    if set(panel.names) == {CHOSEN, REJECTED}:
        _side_legend(axis, len(runs))


def _draw_train(axis: Axes, series: Series, look: dict[str, Any]) -> None:
    if len(series) < _SMOOTH_FROM:
        # A single value has no line.
        axis.plot(series.steps, series.values, marker="." if len(series) == 1 else "", **look)
        return
    axis.plot(series.steps, series.values, **(look | {"linewidth": 0.7, "alpha": 0.25}))
    axis.plot(series.steps, smoothed(series.values), **look)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over windows of a 25th of the values, centred; at the ends of what there is of them.
    NaN and infinity are left out, and stay gaps where a window has nothing else.

    Args:
        values: float64 [n].

    Returns:
        float64 [n].
    """
    half = max(1, len(values) // 50)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    start, stop = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    count = counts[stop] - counts[start]
    return np.where(count > 0, (sums[stop] - sums[start]) / np.maximum(count, 1), np.nan)


def _look(run: int, side: str, runs: int) -> dict[str, Any]:
    """Of one run the sides have two colours; of several runs each has one, and rejected is
    dashed."""
    if runs == 1:
        return {"color": _COLOURS[side == REJECTED], "linestyle": "-", "linewidth": 1.6}
    style = _STYLES[run // len(_COLOURS) % len(_STYLES)]
    return {
        "color": _COLOURS[run % len(_COLOURS)],
        "linestyle": "--" if side == REJECTED else style,
        "linewidth": 1.6,
    }


def _side_legend(axis: Axes, runs: int) -> None:
    from matplotlib.lines import Line2D

    lines = []
    for side in (CHOSEN, REJECTED):
        look = _look(0, side, runs) | ({} if runs == 1 else {"color": "0.35"})
        lines.append(Line2D([], [], label=side, **look))
    axis.legend(handles=lines, fontsize=8, frameon=False, loc="best", handlelength=1.8)


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    from matplotlib.lines import Line2D

    look = {"linewidth": 2.2}
    lines = [
        Line2D([], [], label=run.name, **(_look(index, "", len(runs)) | look))
        for index, run in enumerate(runs)
    ]
    if any(run.evaluations for run in runs):
        lines.append(Line2D([], [], color="0.35", marker="o", markersize=4, label="evaluation"))
    figure.legend(
        handles=lines,
        loc="outside upper left",
        ncols=min(len(lines), 6),
        frameon=False,
        fontsize=10,
    )
