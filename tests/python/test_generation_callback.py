"""Generations at every evaluation of a training: files, log, and a training that is not changed."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the callback belongs to a trainer")

from fusedpo.tools.generate import generate
from fusedpo.tools.generation_callback import GenerationCallback
from fusedpo.tools.generations import read_generations, write_generations
from fusedpo.trl import FusedDPOTrainer
from trl import DPOTrainer
from trl_helpers import logged, lora, make_model, make_pairs, make_trainer, one_thread  # noqa: F401

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.trl]

PROMPTS = [row["prompt"] for row in make_pairs(3)]
SHARES = ("flattery", "evasion", "hedging", "repetition", "degenerate", "verbosity")


def build(folder: pathlib.Path, trainer_class: Any = FusedDPOTrainer, **options: Any) -> Any:
    options = {"eval_strategy": "steps", "eval_steps": 3, "eval_rows": make_pairs(4), **options}
    return make_trainer(trainer_class, folder, **options)


def add(trainer: Any, prompts: Any = PROMPTS, **options: Any) -> None:
    options = {"max_new_tokens": 10, **options}
    trainer.add_callback(GenerationCallback(trainer, prompts, **options))


def counts(trainer: Any) -> list[dict[str, float]]:
    return [e for e in trainer.state.log_history if "eval_generations/characters" in e]


@pytest.mark.parametrize("trainer_class", [DPOTrainer, FusedDPOTrainer])
def test_every_evaluation_has_its_files_and_its_counts(
    tmp_path: pathlib.Path, trainer_class: Any
) -> None:
    trainer = build(tmp_path, trainer_class, learning_rate=0.1)
    add(trainer, n=2)
    trainer.train()
    names = sorted(path.name for path in (tmp_path / "generations").iterdir())
    steps = ("000000", "000003", "000006")
    assert names == [f"generations-{s}.{e}" for s in steps for e in ("jsonl", "md")]
    before, _, after = (
        read_generations(tmp_path / "generations" / f"generations-{s}.jsonl") for s in steps
    )
    assert [each.prompt for each in after] == [p for p in PROMPTS for _ in range(2)]
    options: dict[str, Any] = {"tokenizer": trainer.processing_class, "max_new_tokens": 10, "n": 2}
    assert before == generate(make_model(), PROMPTS, **options)
    assert after == generate(trainer.model, PROMPTS, **options)
    assert after != before
    assert [entry["step"] for entry in counts(trainer)] == [0, 3, 6]
    for entry in counts(trainer):
        assert all(0 <= entry[f"eval_pathologies/{name}"] <= 1 for name in SHARES)


def test_training_is_the_same_with_and_without(tmp_path: pathlib.Path) -> None:
    runs = []
    for with_callback in (True, False):
        trainer = build(
            tmp_path / str(with_callback), with_ref_model=False, keywords={"peft_config": lora()}
        )
        if with_callback:
            add(trainer)
        trainer.train()
        ours = {id(entry) for entry in counts(trainer)}
        entries = zip(logged(trainer), trainer.state.log_history, strict=True)
        runs.append([entry for entry, whole in entries if id(whole) not in ours])
    assert len(runs[0]) >= 8
    assert runs[0] == runs[1]


def test_verbosity_is_relative_to_the_beginning_also_after_a_resumption(
    tmp_path: pathlib.Path,
) -> None:
    trainer = build(tmp_path, save_strategy="steps", save_steps=3)
    add(trainer)
    trainer.train()
    # As if the model had written next to nothing in the beginning.
    first = tmp_path / "generations" / "generations-000000.jsonl"
    short = [type(e)(e.prompt, "x", e.index, 1, False) for e in read_generations(first)]
    write_generations(first, short)
    again = build(tmp_path, save_strategy="steps", save_steps=3)
    add(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert read_generations(first) == short
    assert counts(again)[-1]["step"] == 6
    resumed, whole = counts(again)[-1], counts(trainer)[-1]
    assert resumed["eval_generations/characters"] == whole["eval_generations/characters"]
    assert resumed["eval_pathologies/verbosity"] > whole["eval_pathologies/verbosity"]

    third = build(tmp_path)
    add(third, ["who paints the river ?"])
    with pytest.raises(ValueError, match="1 of 1 are not in"):
        third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    first.unlink()
    last = build(tmp_path)
    add(last)
    with pytest.warns(UserWarning, match="is missing: verbosity is not counted"):
        last.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "eval_pathologies/verbosity" not in counts(last)[-1]


def test_averages_of_the_training_are_not_cut_in_two(tmp_path: pathlib.Path) -> None:
    # Evaluations between two log entries: what was gathered for the next entry stays together.
    trainer = build(tmp_path, logging_steps=6, eval_steps=2)
    add(trainer)
    trainer.train()
    alone = build(tmp_path / "alone", logging_steps=6, eval_steps=2)
    alone.train()
    (got,) = [e for e in logged(trainer) if "loss" in e]
    (want,) = [e for e in logged(alone) if "loss" in e]
    assert got == want


def test_prompts_come_from_a_file_too(tmp_path: pathlib.Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    trainer = build(tmp_path / "run", max_steps=1, eval_steps=1)
    add(trainer, tmp_path / "prompts.txt")
    trainer.train()
    made = read_generations(tmp_path / "run" / "generations" / "generations-000001.jsonl")
    assert [each.prompt for each in made] == PROMPTS


def test_sharded_weights_are_refused_before_the_training(tmp_path: pathlib.Path) -> None:
    trainer = build(tmp_path)
    add(trainer)
    parameter = next(trainer.model.parameters())
    parameter.ds_id = 0  # what DeepSpeed's ZeRO-3 marks its parameters with
    with pytest.raises(ValueError, match="needs the whole model in a process"):
        trainer.train()
    assert not (tmp_path / "generations").exists()


def test_counts_reach_the_reporting_of_the_trainer(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = build(tmp_path, max_steps=2, eval_steps=2, report_to="tensorboard")
    add(trainer)
    trainer.train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert "eval/pathologies/repetition" in accumulator.Tags()["scalars"]


def on_two_ranks(folder: pathlib.Path, add_or_not: str) -> list[dict[str, float]]:
    folder.mkdir()
    script = pathlib.Path(__file__).with_name("generation_two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(script), str(folder), add_or_not],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    loaded: list[dict[str, float]] = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="this torch is built without gloo"
)
def test_first_of_two_ranks_generates_and_the_training_is_the_same(tmp_path: pathlib.Path) -> None:
    log = on_two_ranks(tmp_path / "with", "add")
    made = [entry for entry in log if "eval_generations/characters" in entry]
    assert [entry["step"] for entry in made] == [0, 2, 4]
    assert len(list((tmp_path / "with" / "generations").glob("*.jsonl"))) == 3
    assert [e for e in log if e not in made] == on_two_ranks(tmp_path / "without", "")


def test_training_without_evaluations_is_warned_of(tmp_path: pathlib.Path) -> None:
    trainer = build(tmp_path, max_steps=1, eval_strategy="no")
    add(trainer)
    with pytest.warns(UserWarning, match="the training has no evaluations"):
        trainer.train()


def test_options_are_checked_when_the_callback_is_made(tmp_path: pathlib.Path) -> None:
    trainer = build(tmp_path)
    with pytest.raises(ValueError, match="at least one prompt"):
        add(trainer, [])
    with pytest.raises(ValueError, match="n must be at least 1"):
        add(trainer, n=0)
