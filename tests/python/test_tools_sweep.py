"""Sweeps: one reference store for all runs, a table at the end, and what a kill leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("trl", reason="fusedpo.tools.sweep needs TRL")

import transformers
from fusedpo import RefStore
from fusedpo.tools.sweep import SweepReport, sweep
from fusedpo.tools.train.report import TrainReport
from tools_train_helpers import no_plots, tiny_config  # noqa: F401
from trl_helpers import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")

# Kills itself in the third step of all, which is the first one of the second run.
KILLED = """
import json, os, signal, sys
import torch, transformers
from fusedpo.tools.sweep import sweep
from fusedpo.tools.train import run

torch.set_num_threads(1)
step, steps = transformers.Trainer.training_step, []

def killed(self, *arguments, **keywords):
    steps.append(1)
    if len(steps) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments, **keywords)

transformers.Trainer.training_step = killed
run._plot = lambda *_: None
sweep(json.loads(sys.argv[1]), betas=[0.1, 0.5], losses=["sigmoid", "simpo"], output_dir="sweep")
"""


def config(tiny: dict[str, Any]) -> dict[str, Any]:
    return {**tiny, "strategy": "dpo", "eval_split": 4, "kl_prompts": 2, "kl_max_new_tokens": 4}


def results(report: SweepReport) -> list[dict[str, Any]]:
    """What does not depend on the time."""
    names = ("name", "loss", "beta", "eval_loss", "accuracy", "margin", "kl")
    return [{name: run[name] for name in names} for run in report.as_dict()["runs"]]


@pytest.fixture(scope="module")
def whole(
    tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[SweepReport, pathlib.Path]:
    """A sweep that nothing has interrupted; what it printed is in printed.txt."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        pytest.MonkeyPatch.context() as patch,
    ):
        # The plot of each run costs more than the run; that of all is drawn.
        patch.setattr("fusedpo.tools.train.run._plot", lambda *_: "plot.png")
        report = sweep(
            config(tiny), betas=[0.1, 0.5], losses=["sigmoid", "simpo"], output_dir=str(folder)
        )
    (folder / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")
    return report, folder


def test_runs_share_one_store_and_end_in_a_table_and_a_plot(
    whole: tuple[SweepReport, pathlib.Path],
) -> None:
    report, folder = whole
    assert [run.name for run in report.runs] == [
        f"{loss}-beta{beta}" for loss in ("sigmoid", "simpo") for beta in (0.1, 0.5)
    ]
    assert not any(run.reused for run in report.runs)
    assert report.ref_store == str(folder / "refs")
    assert len(RefStore(str(folder / "refs"))) > 0
    assert not list(folder.glob("runs/*/ref_store"))
    # Of both splits for both runs with a reference: the second run scores nothing.
    lines = (folder / "printed.txt").read_text(encoding="utf-8").split("\n")
    told = [line for line in lines if " records in " in line]
    assert [line.endswith(" 0 missing") for line in told] == [False, False, True, True]
    written = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(report.as_dict()))
    page = (folder / "sweep.md").read_text(encoding="utf-8")
    assert page.count("\n| sigmoid |") == page.count("\n| simpo |") == 2
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    betas = {run.report["run"]["arguments"]["beta"] for run in report.runs}
    assert betas == {0.1, 0.5}
    assert len({run.report["metrics"]["eval_loss"] for run in report.runs}) == 4


def test_what_several_runs_warn_of_is_said_once(
    whole: tuple[SweepReport, pathlib.Path],
) -> None:
    runs = [
        dataclasses.replace(run, report={**run.report, "warnings": ["the loss is nan."] * (i > 1)})
        for i, run in enumerate(whole[0].runs)
    ]
    page = dataclasses.replace(whole[0], runs=tuple(runs)).markdown()
    assert "* simpo-beta0.1, simpo-beta0.5: the loss is nan.\n" in page
    assert page.count("nan") == 1


def test_a_sweep_that_was_killed_goes_on_where_it_was(
    tiny: dict[str, Any], tmp_path: pathlib.Path, whole: tuple[SweepReport, pathlib.Path]
) -> None:
    command = [sys.executable, "-c", KILLED, json.dumps(config(tiny))]
    killed = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    runs = tmp_path / "sweep" / "runs"
    finished = runs / "sigmoid-beta0.1" / "report.json"
    before = finished.stat()
    assert not list(runs.glob("sigmoid-beta0.5/report.json"))
    assert not (tmp_path / "sweep" / "sweep.json").exists()

    report = sweep(
        config(tiny),
        betas=[0.1, 0.5],
        losses=["sigmoid", "simpo"],
        output_dir=str(tmp_path / "sweep"),
    )
    after = finished.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [run.reused for run in report.runs] == [True, False, False, False]
    assert results(report) == results(whole[0])
    stores = [RefStore(str(f / "refs")) for f in (tmp_path / "sweep", whole[1])]
    assert len(stores[0]) == len(stores[1])
    assert all(store.verify().ok for store in stores)


def test_a_diverged_run_is_finished_and_not_repeated(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    options = {**config(tiny), "learning_rate": 1e30}
    for reused in (False, True):
        report = sweep(options, betas=[0.1], output_dir=str(tmp_path))
        assert [run.reused for run in report.runs] == [reused]
    assert "diverged" in report.markdown()
    assert report.as_dict()["runs"][0]["kl"] is None


class _CutOff(BaseException):
    """As a signal, at a place that a test chooses."""


def test_a_run_without_its_report_is_repeated(
    tiny: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: Any, **__: Any) -> None:
        raise _CutOff

    options = {**config(tiny), "kl_prompts": 0, "max_steps": 1}
    trainer = transformers.Trainer
    for owner, method in ((trainer, "train"), (trainer, "save_model"), (TrainReport, "write")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, cut_off)
            with pytest.raises(_CutOff):
                sweep(options, betas=[0.1], output_dir=str(tmp_path))
    report = sweep(options, betas=[0.1], output_dir=str(tmp_path))
    assert [run.reused for run in report.runs] == [False]


def test_a_finished_sweep_trains_nothing_and_a_longer_one_only_what_is_new(
    tiny: dict[str, Any],
    whole: tuple[SweepReport, pathlib.Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fusedpo.tools.sweep import run as module

    trained: list[str] = []
    original = module.run_plan

    def record(plan: Any) -> Any:
        trained.append(os.path.basename(plan.run.output_dir))
        return original(plan)

    monkeypatch.setattr(module, "run_plan", record)
    report, folder = whole
    again = sweep(
        config(tiny), betas=[0.1, 0.5], losses=["sigmoid", "simpo"], output_dir=str(folder)
    )
    assert trained == []
    assert results(again) == results(report)
    sweep(config(tiny), betas=[0.1], losses=["sigmoid", "ipo"], output_dir=str(folder))
    assert trained == ["ipo-beta0.1"]


def test_a_run_of_another_configuration_or_other_data_is_not_reused(
    tiny: dict[str, Any], tmp_path: pathlib.Path, whole: tuple[SweepReport, pathlib.Path]
) -> None:
    folder = str(whole[1])
    with pytest.raises(ValueError, match=r"arguments\.learning_rate was 0\.003, is 0\.1"):
        sweep({**config(tiny), "learning_rate": 0.1}, betas=[0.1], losses=["simpo"],
              output_dir=folder)  # fmt: skip
    rows = pathlib.Path(tiny["dataset"]).read_text(encoding="utf-8")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(rows.split("\n")[:20]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        sweep({**config(tiny), "dataset": str(fewer)}, betas=[0.1], losses=["simpo"],
              output_dir=folder)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "must have several values of beta or loss"),
        ({"betas": [0.1, 0.1]}, "every beta must be there once"),
        ({"losses": ["ipo", "ipo"]}, "every loss must be there once"),
        ({"losses": ["sigmoid", "dpoo"]}, "strategy must be one of .* Did you mean dpo"),
        ({"losses": ["sft"]}, "sft has no beta"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(config(tiny), output_dir=str(tmp_path / "sweep"), **options)
    assert not (tmp_path / "sweep").exists()


def test_betas_that_agree_in_six_digits_have_folders_of_their_own(
    tiny: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedpo.tools.sweep import run as module

    folders: list[str] = []

    def record(configs: Any, output_dir: str) -> Any:
        folders.append(os.path.basename(output_dir))
        return original(configs, output_dir=output_dir)

    def stop(plan: Any) -> Any:
        raise _CutOff

    original = module.plan_stages
    monkeypatch.setattr(module, "plan_stages", record)
    monkeypatch.setattr(module, "run_plan", stop)
    with pytest.raises(_CutOff):
        sweep(config(tiny), betas=[0.1, 0.1000001, 1], output_dir=str(tmp_path))
    assert folders == ["dpo-beta0.1", "dpo-beta0.1000001", "dpo-beta1"]


def test_a_sweep_may_keep_its_reference_in_memory(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    options = {**config(tiny), "kl_prompts": 0, "precompute_ref_log_probs": False}
    assert sweep(options, betas=[0.1], output_dir=str(tmp_path)).ref_store is None


def test_an_option_that_one_loss_lacks_stops_the_sweep_before_it_begins(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    options = {**config(tiny), "ld_alpha": 0.5}
    with pytest.raises(ValueError, match=r"'ld_alpha' is no option .* strategy 'simpo'"):
        sweep(options, losses=["sigmoid", "simpo"], output_dir=str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()
