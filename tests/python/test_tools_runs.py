"""`fusedpo.tools.runs`: what a training logged is read from every place that TRL leaves it in."""

from __future__ import annotations

import os
import pathlib
import pickle
import zipfile
from typing import Any

import numpy as np
import pytest
from fusedpo.tools.runs import read_run, read_runs, tokens_per_step
from fusedpo.tools.saved_arguments import read_arguments
from run_logs import simulate, write_run


def entries(*steps: int) -> list[dict[str, Any]]:
    return [{"loss": 1.0 / step, "step": step} for step in steps]


def test_a_real_run_is_read_whole(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("trl", reason="the run is TRL's")
    from datasets import Dataset
    from trl import DPOTrainer
    from trl_helpers import make_config, make_model, make_pairs, make_tokenizer

    every_third = {"save_strategy": "steps", "save_steps": 3}
    every_third |= {"eval_strategy": "steps", "eval_steps": 3}
    trainer = DPOTrainer(
        make_model(),
        ref_model=make_model(),
        args=make_config(tmp_path / "run", beta=0.3, loss_type=["hinge"], **every_third),
        train_dataset=Dataset.from_list(make_pairs()),
        eval_dataset={
            "short": Dataset.from_list(make_pairs(4, seed=1)),
            "long": Dataset.from_list(make_pairs(4, seed=2)),
        },
        processing_class=make_tokenizer(),
    )
    trainer.train()
    of_checkpoint = read_run(tmp_path / "run" / "checkpoint-3")
    assert of_checkpoint.last_step == 3
    run = read_run(tmp_path / "run")
    assert run.path == tmp_path / "run" / "checkpoint-6" / "trainer_state.json"
    assert run.name == of_checkpoint.name == "run"
    history = [each for each in trainer.state.log_history if "loss" in each]
    for name in ("loss", "rewards/margins", "logps/chosen", "entropy", "grad_norm"):
        assert run.train[name].values.tolist() == [each[name] for each in history]
        assert run.train[name].steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert set(run.evaluations) == {"eval_short", "eval_long"}
    short = [each for each in trainer.state.log_history if "eval_short_loss" in each]
    series = run.evaluations["eval_short"]
    assert series["loss"].values.tolist() == [each["eval_short_loss"] for each in short]
    margins = [each["eval_rewards/margins"] for each in short]
    assert series["rewards/margins"].values.tolist() == margins
    assert run.config == "DPOConfig"
    saved = trainer.args.to_dict()
    assert run.arguments["loss_type"] == ["hinge"]
    for name in ("beta", "max_steps", "lr_scheduler_type", "eval_strategy", "bf16", "max_length"):
        assert run.arguments[name] == saved[name]

    trainer.save_state()  # as many steps as the last checkpoint, and the summary
    run = read_run(tmp_path / "run")
    assert run.path == tmp_path / "run" / "trainer_state.json"
    assert run.summary["train_runtime"] > 0
    assert run.config == "DPOConfig"  # the newest checkpoint's


def test_the_state_with_the_most_steps_counts(tmp_path: pathlib.Path) -> None:
    write_run(tmp_path / "run", entries(1, 2))
    write_run(tmp_path / "run" / "checkpoint-9", entries(1, 2, 9))
    write_run(tmp_path / "run" / "checkpoint-10", entries(1, 2, 10))
    assert read_run(tmp_path / "run").last_step == 10
    assert read_run(tmp_path / "run" / "trainer_state.json").last_step == 2


def test_the_checkpoint_of_another_training_does_not_count(tmp_path: pathlib.Path) -> None:
    ended = [*entries(1, 2), {"train_runtime": 3.0, "step": 2}, {"eval_loss": 0.5, "step": 2}]
    write_run(tmp_path / "run", ended)
    other = write_run(tmp_path / "run" / "checkpoint-3", [{"loss": 9.0, "step": 1}, *entries(2, 3)])
    assert read_run(tmp_path / "run").last_step == 2
    write_run(other, entries(1, 2, 3))  # resumed, and not over
    assert read_run(tmp_path / "run").last_step == 3


def test_of_a_step_that_was_logged_twice_the_last_value_counts(tmp_path: pathlib.Path) -> None:
    log = [*entries(1, 2, 3), {"loss": 9.0, "step": 2}]
    series = read_run(write_run(tmp_path / "run", log)).train["loss"]
    assert series.steps.tolist() == [1, 2, 3]
    assert series.values[1] == 9.0


def test_nan_and_infinity_are_read_as_they_were_logged(tmp_path: pathlib.Path) -> None:
    log = [{"loss": float("nan"), "step": 1}, {"loss": float("inf"), "step": 2}]
    values = read_run(write_run(tmp_path / "run", log)).train["loss"].values
    assert np.isnan(values[0])
    assert np.isinf(values[1])


def test_tokens_per_step_follow_from_the_running_total(tmp_path: pathlib.Path) -> None:
    totals = {2: 200.0, 4: 420.0, 6: 50.0, 8: 250.0}  # resumed after step 4: counted from 0 again
    log = [{"num_tokens": total, "step": step} for step, total in totals.items()]
    tokens = tokens_per_step(read_run(write_run(tmp_path / "run", log)))
    assert tokens is not None
    assert dict(zip(tokens.steps.tolist(), tokens.values.tolist(), strict=True)) == {
        2: 100.0,
        4: 110.0,
        8: 100.0,
    }
    assert tokens_per_step(read_run(write_run(tmp_path / "none", entries(1)))) is None


def test_names_are_the_shortest_ends_of_paths_that_differ(tmp_path: pathlib.Path) -> None:
    paths = [tmp_path / each for each in ("a/run", "b/run", "b/other")]
    for path in paths:
        write_run(path, entries(1))
    assert [run.name for run in read_runs(paths[1:])] == ["run", "other"]
    assert [run.name for run in read_runs(paths)] == ["a/run", "b/run", "b/other"]
    checkpoints = [write_run(tmp_path / "a/run" / f"checkpoint-{n}", entries(n)) for n in (1, 2)]
    assert [run.name for run in read_runs(checkpoints)] == [str(path) for path in checkpoints]
    with pytest.raises(ValueError, match="each run must be named once"):
        read_runs([paths[0], paths[0]])
    with pytest.raises(ValueError, match="at least one run"):
        read_runs([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "which is JSON"),
        ("[]", "an object with a list log_history"),
        ('{"log_history": {}}', "an object with a list log_history"),
        ('{"log_history": [{"loss": 1.0}]}', "must have a step"),
        ('{"log_history": []}', "must have logged values; got none.*logging_steps=1"),
    ],
)
def test_what_is_no_trainer_state_is_refused(
    text: str, message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "trainer_state.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_a_folder_without_a_state_says_where_one_comes_from(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="save_strategy"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_run(tmp_path / "nothing")


def pickled(folder: pathlib.Path, value: Any) -> pathlib.Path:
    """The way torch.save lays out a file."""
    path = folder / "training_args.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training_args/data.pkl", pickle.dumps(value))
    return path


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


class Arguments:
    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)


def test_a_pickle_runs_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = pickled(tmp_path, Arguments(beta=0.1, bad=Harmful(), hub_token="secret", _n_gpu=1))
    kind, arguments = read_arguments(path)
    assert kind == "Arguments"
    assert arguments == {"beta": 0.1, "bad": "harm"}  # what a call of one argument looks like
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"no zip"])
def test_arguments_that_cannot_be_read_are_told_and_do_not_hide_the_log(
    content: bytes, tmp_path: pathlib.Path
) -> None:
    write_run(tmp_path, simulate())
    (tmp_path / "training_args.bin").write_bytes(content)
    run = read_run(tmp_path)
    assert run.arguments == {}
    assert "training_args.bin" in str(run.arguments_problem)
    pickled(tmp_path, [1, 2])
    assert "must hold the arguments" in str(read_run(tmp_path).arguments_problem)
