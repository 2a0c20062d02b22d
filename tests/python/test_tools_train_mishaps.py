"""Trainings that diverge, find what an earlier one has left, or have data and models out of the
ordinary: each has its report, or is refused before it begins."""

from __future__ import annotations

import datetime
import json
import pathlib
import shutil
import types
from typing import Any

import pytest

pytest.importorskip("trl", reason="fusedpo.tools.train needs TRL")

from datasets import Dataset
from fusedpo.tools.train import train, train_stages
from fusedpo.tools.train.kl import KLEstimate
from tools_train_helpers import no_plots, tiny_config  # noqa: F401
from trl_helpers import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("strategy", ["dpo", "cpo"])
def test_a_model_with_code_of_its_own_is_trained_where_that_is_trusted(
    strategy: str, tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(tiny["model_name"], folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parent = config["architectures"][0]
    own = {"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Model"}
    config |= {"model_type": "own", "architectures": ["Model"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own_code.py").write_text(
        f"import transformers\n\n\nclass Config(transformers.{parent}.config_class):\n"
        f"    model_type = 'own'\n\n\nclass Model(transformers.{parent}):\n"
        "    config_class = Config\n",
        encoding="utf-8",
    )
    options = {**tiny, "model_name": str(folder), "strategy": strategy, "trust_remote_code": True}
    report = train(
        {**options, "eval_split": 4, "kl_max_new_tokens": 4}, output_dir=str(tmp_path / "out")
    )
    assert isinstance(report.kl, KLEstimate)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("strategy", ["dpo", "sft"])
def test_a_training_that_diverged_has_its_report(
    strategy: str, tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    options = {**tiny, "strategy": strategy, "eval_split": 4, "learning_rate": 1e30}
    report = train(options, output_dir=str(tmp_path))
    assert report.kl == "ValueError: the policy's logits are not finite"
    assert sum("logits are not finite" in each for each in report.warnings) == 1
    assert any("diverged" in each for each in report.warnings)
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["kl"] is None


@pytest.mark.usefixtures("no_plots")
def test_a_reference_that_cannot_be_loaded_again_does_not_cost_the_report(
    tiny: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise OSError("no such model")

    monkeypatch.setattr("fusedpo.tools.train.run.load", gone)
    report = train({**tiny, "strategy": "dpo", "eval_split": 4}, output_dir=str(tmp_path))
    assert report.kl == "OSError: no such model"
    assert (tmp_path / "report.json").exists()


@pytest.mark.usefixtures("no_plots")
def test_a_column_that_json_cannot_write_does_not_stop_a_training(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    rows = [{"text": f"2 and {i}", "at": datetime.datetime(2024, 1, i)} for i in range(1, 9)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    options = {**tiny, "dataset": str(tmp_path / "rows.parquet"), "eval_split": 2}
    report = train({**options, "strategy": "sft"}, output_dir=str(tmp_path / "out"))
    assert (report.data["train_rows"], report.data["eval_rows"]) == (6, 2)


def test_a_folder_with_checkpoints_of_another_training_is_refused(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    options = {**tiny, "strategy": "dpo", "save_strategy": "steps", "save_steps": 1}
    train(options, output_dir=str(tmp_path / "one"))
    written = (tmp_path / "one" / "report.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="one has checkpoints of another training; remove them"):
        train({**options, "max_steps": 1}, output_dir=str(tmp_path / "one"))
    (tmp_path / "1-dpo" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(ValueError, match="1-dpo has checkpoints of another training"):
        train_stages([options, options], output_dir=str(tmp_path))
    assert (tmp_path / "one" / "report.json").stat().st_mtime_ns == written
    resumed = {**options, "resume_from_checkpoint": str(tmp_path / "one" / "checkpoint-1")}
    assert train(resumed, output_dir=str(tmp_path / "one")).plot is not None


def test_a_plot_is_of_this_training_whatever_else_is_in_the_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedpo.tools import plot
    from fusedpo.tools.train import run

    drawn: list[list[str]] = []
    monkeypatch.setattr(
        plot, "plot", lambda runs, path: drawn.append(runs) or types.SimpleNamespace(path=path)
    )
    state = types.SimpleNamespace(log_history=[{"loss": 0.5, "step": 1}])
    run._plot(types.SimpleNamespace(state=state, is_world_process_zero=lambda: True), "out")
    assert drawn == [["out/trainer_state.json"]]
