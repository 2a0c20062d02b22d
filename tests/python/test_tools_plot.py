"""`fusedpo.tools.plot`: the panels have what the runs have, and drawing leaves no trace in
matplotlib."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")

import matplotlib
from fusedpo.tools import plot as module
from fusedpo.tools.plot import plot, smoothed
from fusedpo.tools.runs import read_run
from run_logs import simulate, write_run

ALL = (
    "loss",
    "accuracy",
    "margin",
    "rewards",
    "log-probabilities",
    "entropy",
    "length",
    "gradient norm",
)


def drawn(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Any:
    """The figure that a call of plot makes."""
    figures = []
    draw = module._draw
    monkeypatch.setattr(module, "_draw", lambda *given: figures.append(draw(*given)) or figures[0])
    plot(*arguments)
    return figures[0]


def panel(figure: Any, title: str) -> Any:
    return next(axis for axis in figure.axes if axis.get_title(loc="left") == title)


def test_every_panel_of_several_runs_is_drawn(tmp_path: pathlib.Path) -> None:
    runs = [
        write_run(tmp_path / name, simulate(beta=beta)) for name, beta in (("a", 0.1), ("b", 1))
    ]
    report = plot(runs, tmp_path / "made" / "runs.png")
    assert report.panels == ALL
    assert report.runs == ("a", "b")
    assert report.as_dict()["panels"] == list(ALL)
    data = (tmp_path / "made" / "runs.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 50_000


def test_lines_are_the_logged_values(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path / "run", simulate(steps=40))
    run = read_run(path)
    figure = drawn(monkeypatch, [path], tmp_path / "run.svg")
    lines = panel(figure, "rewards").get_lines()
    want = [run.train["rewards/chosen"], run.train["rewards/rejected"]]
    want += [run.evaluations["eval"]["rewards/chosen"], run.evaluations["eval"]["rewards/rejected"]]
    for line, series in zip(lines, want, strict=False):
        assert np.array_equal(line.get_xdata(), series.steps)
        assert np.array_equal(line.get_ydata(), series.values)
    colours = [line.get_color() for line in lines[:4]]
    assert colours[:2] == colours[2:]  # an evaluation has its side's colour
    assert colours[0] != colours[1]


def test_the_loss_of_a_policy_that_is_its_reference_is_a_dotted_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path / "run", simulate())
    figure = drawn(monkeypatch, [path], tmp_path / "run.png")
    levels = [line.get_ydata()[0] for line in panel(figure, "loss").get_lines()]
    assert np.log(2) == pytest.approx(levels[-1])


def test_panels_that_no_run_can_fill_are_left_out(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = [{"loss": 2.0, "entropy": 1.0, "step": step} for step in (1, 2, 3)]
    sft = write_run(tmp_path / "sft", log)
    assert plot([sft], tmp_path / "sft.png").panels == ("loss", "entropy")
    dpo = write_run(tmp_path / "dpo", simulate())
    figure = drawn(monkeypatch, [sft, dpo], tmp_path / "both.svg")
    assert [axis.get_title(loc="left") for axis in figure.axes] == list(ALL)
    assert (tmp_path / "both.svg").read_bytes().startswith(b"<?xml")


def test_logged_lengths_take_the_place_of_tokens_per_step(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = [
        {"completions/mean_length": 7.0 * step, "num_tokens": 100.0 * step, "step": step}
        for step in (1, 2, 3)
    ]
    path = write_run(tmp_path / "grpo", log)
    figure = drawn(monkeypatch, [path], tmp_path / "grpo.png")
    assert panel(figure, "length").get_lines()[0].get_ydata().tolist() == [7, 14, 21]


def test_a_run_that_diverged_is_drawn_with_gaps(tmp_path: pathlib.Path) -> None:
    log = [
        each | ({"loss": float("nan")} if each["step"] > 50 and "loss" in each else {})
        for each in simulate(steps=100)
    ]
    path = write_run(tmp_path / "run", log)
    assert "loss" in plot([path], tmp_path / "run.png").panels


def test_smoothing_keeps_a_line_and_leaves_out_what_is_no_number() -> None:
    line = np.arange(100.0)
    inner = slice(5, -5)
    assert np.allclose(smoothed(line)[inner], line[inner])
    line[50] = np.nan
    assert np.isfinite(smoothed(line)).all()
    line[40:60] = np.nan
    gaps = np.isnan(smoothed(line))
    assert gaps[45:55].all()
    assert not gaps[:35].any()


def test_global_state_of_matplotlib_stays(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    names = set(matplotlib.rcParams) - {"backend"}  # which is resolved by pyplot when it is read
    before = {name: matplotlib.rcParams[name] for name in names}
    plot([write_run(tmp_path / "run", simulate())], tmp_path / "run.png")
    assert "matplotlib.pyplot" not in sys.modules
    assert {name: matplotlib.rcParams[name] for name in names} == before


def test_what_cannot_be_drawn_is_refused(tmp_path: pathlib.Path) -> None:
    path = write_run(tmp_path / "run", simulate())
    with pytest.raises(ValueError, match=r"\.png or \.svg; got runs\.jpg"):
        plot([path], tmp_path / "runs.jpg")
    with pytest.raises(TypeError, match=r"Write \[run\]"):
        plot(str(path), tmp_path / "runs.png")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one run"):
        plot([], tmp_path / "runs.png")
    with pytest.raises(ValueError, match="different names; got run, run"):
        plot([read_run(path), read_run(path)], tmp_path / "runs.png")
    other = write_run(tmp_path / "other", [{"kl": 1.0, "step": 1}])
    with pytest.raises(ValueError, match=r"must have logged one of loss.*got kl"):
        plot([path, other], tmp_path / "runs.png")


def test_without_matplotlib_the_extra_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path / "run", simulate())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"fusedpo\[plot\]\""):
        plot([path], tmp_path / "run.png")
