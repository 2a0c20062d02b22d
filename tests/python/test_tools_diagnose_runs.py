"""`fusedpo.tools.diagnose` on real runs of a tiny model, most of which were made to go wrong."""

from __future__ import annotations

import json
import pathlib
import random
from typing import Any

import pytest

pytest.importorskip("trl", reason="the runs are TRL's")

import fusedpo
from datasets import Dataset
from fusedpo.cli.diagnose import diagnose as command
from fusedpo.tools.diagnose import Diagnosis, diagnose
from fusedpo.tools.pair_scores import score_pairs
from fusedpo.tools.run_facts import LN2, start_loss
from fusedpo.tools.runs import read_run
from fusedpo.trl import FusedDPOTrainer
from trl import DPOTrainer
from trl_helpers import (
    lora,
    make_model,
    make_pairs,
    make_tokenizer,
    make_trainer,
    one_thread,  # noqa: F401  a fixture
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {
    "bf16": False,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
WORDS = "the cat a dog my friend old king one bird sees likes follows paints tree river"


def sentence(rng: random.Random, words: int) -> str:
    return "".join(" " + rng.choice(WORDS.split()) for _ in range(words))


def nearly_identical(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs that differ in one word of eight."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        chosen = sentence(rng, 8).split()
        rejected = list(chosen)
        rejected[rng.randrange(8)] = rng.choice(WORDS.split())
        texts = {"chosen": " " + " ".join(chosen), "rejected": " " + " ".join(rejected)}
        rows.append({"prompt": "who sees a tree ?", **texts})
    return rows


def longer_is_better(count: int, seed: int) -> list[dict[str, str]]:
    """Random words, of which nine times of ten the longer text is chosen."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        texts = sorted((sentence(rng, n) for n in rng.sample(range(2, 20), 2)), key=len)
        if rng.random() < 0.1:
            texts.reverse()
        rows.append({"prompt": "who sees a tree ?", "chosen": texts[1], "rejected": texts[0]})
    return rows


def coin_tosses(count: int, seed: int) -> list[dict[str, str]]:
    """Preferences without a rule."""
    rng, rows = random.Random(seed), make_pairs(count, seed)
    for row in rows:
        if rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def train(folder: pathlib.Path, trainer_class: Any = FusedDPOTrainer, **options: Any) -> Diagnosis:
    options = {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 10, **options}
    options = {"rows": make_pairs(32), "eval_rows": make_pairs(24, seed=1), **options}
    trainer = make_trainer(trainer_class, folder, **options)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    return diagnose(folder)


def found(report: Diagnosis) -> set[str]:
    return {finding.rule for finding in report.findings}


@pytest.mark.parametrize("trainer_class", [DPOTrainer, FusedDPOTrainer])
def test_a_run_that_learns_passes(trainer_class: Any, tmp_path: pathlib.Path) -> None:
    report = train(tmp_path, trainer_class)
    assert not report.findings, report.render()
    assert set(report.not_checked) == {"length_exploitation"}


def test_what_a_kto_run_logs_is_enough_for_the_rules_of_its_rewards(
    tmp_path: pathlib.Path,
) -> None:
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in make_pairs(16)
        for side in ("chosen", "rejected")
    ]
    trainer = KTOTrainer(
        make_model(),
        ref_model=make_model(),
        args=KTOConfig(str(tmp_path), **SHORT, max_steps=16),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    report = diagnose(tmp_path)
    assert not report.findings, report.render()
    rules = {"chosen_logps_fall", "beta_too_low", "beta_too_high", "not_finite", "loss_rises"}
    assert set(report.passed) == rules
    assert "rewards/accuracies" in report.not_checked["accuracy_without_margin"]


FAULTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a learning rate of almost 0": ({"learning_rate": 1e-7}, {"loss_stuck_at_start"}),
    "beta of 0.001": ({"beta": 0.001, "learning_rate": 1e-2}, {"beta_too_low"}),
    "beta of 20": ({"beta": 20.0, "learning_rate": 1e-4}, {"beta_too_high"}),
    "labels by chance": (
        {
            "rows": coin_tosses(16, 0),
            "eval_rows": coin_tosses(24, 1),
            "learning_rate": 5e-3,
            "beta": 0.2,
        },
        {"eval_loss_rises", "train_eval_gap"},
    ),
    "nearly identical pairs": (
        {
            "rows": nearly_identical(16, 0),
            "eval_rows": nearly_identical(16, 0),
            "learning_rate": 3e-2,
            "max_steps": 60,
        },
        {"chosen_logps_fall"},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_goes_wrong_is_told_what_went_wrong(name: str, tmp_path: pathlib.Path) -> None:
    options, rules = FAULTS[name]
    report = train(tmp_path, **options)
    # Large steps may take the policy so far that this is told, too.
    assert rules <= found(report) <= rules | {"beta_too_low"}, report.render()


def test_a_learning_rate_of_3_is_told(tmp_path: pathlib.Path) -> None:
    """Such steps are chaotic and differ from processor to processor. A run of which the loss falls
    again in the end has other findings, so a few runs are allowed."""
    for seed in range(6):
        folder = tmp_path / str(seed)
        report = train(folder, learning_rate=3.0, lr_scheduler_type="constant", seed=seed)
        assert report.findings
        if {"loss_rises", "beta_too_low"} <= found(report):
            return
    pytest.fail(report.render())


def test_length_exploitation_is_seen_by_scoring_pairs_with_the_trained_model(
    tmp_path: pathlib.Path,
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    held_out = longer_is_better(80, 2)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in held_out), encoding="utf-8")
    rows = longer_is_better(128, 0)
    report = train(tmp_path / "run", rows=rows, eval_rows=rows[:8], learning_rate=3e-3)
    assert "length_exploitation" in report.not_checked

    run = str(tmp_path / "run")
    scored = command(run, data=str(data), reference=str(tmp_path / "model"))
    assert scored.code == 0
    assert [each["rule"] for each in scored.report["findings"]] == ["length_exploitation"]
    correlation = scored.report["findings"][0]["evidence"][0]["value"]
    assert correlation > 0.5

    # The same from a store that was filled before, in place of the model.
    refs = tmp_path / "refs"
    fusedpo.precompute(str(tmp_path / "model"), str(data), refs, autocast="no")
    stored = command(run, data=str(data), reference=str(refs))
    assert stored.report == scored.report


def test_scored_margins_are_the_trainers(tmp_path: pathlib.Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = make_pairs(24, seed=1)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train(tmp_path / "run", eval_rows=rows, max_steps=10)
    run = read_run(tmp_path / "run")
    scores = score_pairs(tmp_path / "run", tmp_path / "model", str(data), beta=0.1, autocast="no")
    evaluated = run.evaluations["eval"]["rewards/margins"].values[-1]
    assert scores.margins.mean() == pytest.approx(evaluated, rel=1e-4)
    words = [(len(row["chosen"].split()), len(row["rejected"].split())) for row in rows]
    lengths = zip(scores.chosen_lengths, scores.rejected_lengths, strict=True)
    assert [(c - 1, r - 1) for c, r in lengths] == words  # TRL adds an end


def test_an_adapter_is_scored_on_the_model_that_it_was_made_for(tmp_path: pathlib.Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = make_pairs(40)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    trainer = make_trainer(
        FusedDPOTrainer,
        tmp_path / "run",
        model=str(tmp_path / "model"),
        with_ref_model=False,
        keywords={"peft_config": lora()},
        rows=rows,
        learning_rate=3e-2,
        max_steps=20,
    )
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    result = command(str(tmp_path / "run"), data=str(data))
    assert "length_exploitation" not in result.report["not_checked"]


def test_pairs_cannot_be_scored_without_a_reference_or_a_model(tmp_path: pathlib.Path) -> None:
    train(tmp_path / "run", max_steps=8)
    run = str(tmp_path / "run")
    with pytest.raises(ValueError, match="--reference MODEL"):
        command(run, data="pairs.jsonl")
    with pytest.raises(ValueError, match="name --data, too"):
        command(run, reference="model")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ValueError, match="must have the trained model; name it: --model"):
        command(run, data="pairs.jsonl", reference="model")


LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"loss_type": ["ipo"], "beta": 0.3},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.2},
    "sum": {"loss_type": ["hinge", "nca_pair", "apo_zero"], "loss_weights": [0.5, 2.0, 1.0]},
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_at_the_start_is_trls_first_loss(name: str, tmp_path: pathlib.Path) -> None:
    trainer = make_trainer(DPOTrainer, tmp_path, max_steps=1, **LOSSES[name])
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    run = read_run(tmp_path)
    assert start_loss(run) == pytest.approx(run.train["loss"].values[0], rel=1e-5)
    if name == "sigmoid":
        assert start_loss(run) == pytest.approx(LN2)


def test_the_loss_at_the_start_is_not_told_where_it_depends_on_the_data(
    tmp_path: pathlib.Path,
) -> None:
    trainer = make_trainer(DPOTrainer, tmp_path, max_steps=1, loss_type=["sigmoid", "sft"])
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    assert start_loss(read_run(tmp_path)) is None
