"""Every option of DPOConfig does what docs/trl.md says of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from fusedpo.trl import FusedDPOTrainer, refusals
from fusedpo.trl.versions import at_least
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl_helpers import (
    BEFORE_5,
    assert_equal_logs,
    logged,
    make_config,
    make_model,
    make_pairs,
    one_thread,  # noqa: F401  a fixture
    train,
)
from trl_options import DOCUMENT, EQUAL, REFUSED, ROWS, SAME_END, Row, written

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

FIELDS = {each.name for each in dataclasses.fields(DPOConfig)}
# Older releases of transformers lack some options, and have had others.
TRIED = [row for row in ROWS if row.tried and row.name in FIELDS]
OLD = {each.name for each in dataclasses.fields(TrainingArguments)} if BEFORE_5 else set()
NOT_SHARED = ("neftune_noise_alpha", "disable_dropout")
HALF = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval")


def test_every_option_of_dpo_config_has_a_row() -> None:
    assert {row.name for row in ROWS} >= FIELDS - OLD
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_the_document_has_the_table_of_these_rows() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert written(text) == text, "run: python tests/python/trl_options.py"


def run(trainer_class: Any, folder: Any, row: Row) -> Any:
    setup = dict(row.setup)
    options: dict[str, Any] = {"max_steps": 2} | row.tried
    if trainer_class is DPOTrainer:
        options |= row.trl
    if setup.pop("evaluate", False):
        setup["eval_rows"] = make_pairs(4, seed=1)
    if setup.pop("by_path", False):
        setup |= {"model": str(folder / "model"), "with_ref_model": False}
    if "rows" in setup:
        setup["rows"] = make_pairs(setup["rows"])
    return train(trainer_class, folder / trainer_class.__name__, **setup, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    made = tmp_path_factory.mktemp("options")
    make_model().save_pretrained(made / "model")
    return made


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("row", [r for r in TRIED if r.verdict == EQUAL], ids=lambda r: r.name)
def test_two_steps_log_what_trl_logs(row: Row, folder: Any) -> None:
    theirs = logged(run(DPOTrainer, folder, row))
    trainer = run(FusedDPOTrainer, folder, row)
    assert trainer._shared_prompts.active == (row.name not in NOT_SHARED)
    ours = logged(trainer)
    assert "loss" in theirs[0] or "eval_loss" in theirs[0]
    if row.name not in HALF:
        assert_equal_logs(ours, theirs)
        return
    # bf16 rounds at other places: its own precision of a sum of about 60 nats is all to ask.
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if "rewards/" in name or "grad_norm" in name:
                continue  # differences of such sums
            assert math.isclose(mine[name], value, rel_tol=2e-2, abs_tol=2e-2), name


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("row", [r for r in TRIED if r.verdict == SAME_END], ids=lambda r: r.name)
def test_both_trainers_log_the_same_or_fail_with_the_same_error(row: Row, folder: Any) -> None:
    if not at_least(*row.since):
        pytest.skip(f"this option is tried in this way since TRL {row.since}")
    ends: list[Any] = []
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        try:
            ends.append(logged(run(trainer_class, folder, row)))
        except (AttributeError, ImportError, ValueError) as error:
            ends.append((type(error), str(error)))
    theirs, ours = ends
    if isinstance(theirs, tuple):
        assert ours == theirs
    else:
        assert_equal_logs(ours, theirs)


@pytest.mark.parametrize("row", [r for r in TRIED if r.verdict == REFUSED], ids=lambda r: r.name)
def test_what_is_not_followed_is_refused_by_name(row: Row, folder: Any) -> None:
    with pytest.raises(ValueError, match=f"DPOConfig.{row.name} must be"):
        run(FusedDPOTrainer, folder, row)


@pytest.mark.skipif(at_least(1, 15), reason="since TRL 1.15 it selects no other loss")
def test_ligers_own_loss_is_refused_by_name(folder: Any) -> None:
    with pytest.raises(ValueError, match="use_liger_kernel must be False below TRL"):
        train(FusedDPOTrainer, folder, use_liger_kernel=True)


def test_an_option_that_a_newer_trl_adds_is_refused_where_it_is_set(
    folder: Any, monkeypatch: Any
) -> None:
    newer = dataclasses.make_dataclass(
        "NewerConfig", [("margin_cap", float, dataclasses.field(default=0.0))], bases=(DPOConfig,)
    )
    options = {"output_dir": str(folder), "bf16": False, "use_cpu": True}
    refusals.refuse_options(newer(**options, margin_cap=1.0))  # a class of the user's
    monkeypatch.setattr(refusals, "DPOConfig", newer)
    refusals.refuse_options(newer(**options))
    with pytest.raises(ValueError, match=r"DPOConfig.margin_cap=1.0 is not known to this fusedpo"):
        refusals.refuse_options(newer(**options, margin_cap=1.0))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("beta", r".*args=DPOConfig\(beta=...\)"),
        ("ref_stores", r"Did you mean ref_store\?"),
        ("tokenizer", r"It takes model, ref_model, args, .*ref_store"),
    ],
)
def test_unknown_arguments_are_refused_with_what_is_meant(
    name: str, remedy: str, folder: Any
) -> None:
    with pytest.raises(TypeError, match=f"FusedDPOTrainer has no argument '{name}'. {remedy}"):
        train(FusedDPOTrainer, folder, keywords={name: 0.1})


def test_arguments_of_another_trainer_are_refused(folder: Any) -> None:
    with pytest.raises(TypeError, match=r"args must be a trl\.DPOConfig; got TrainingArguments"):
        FusedDPOTrainer(make_model(), args=TrainingArguments(str(folder), use_cpu=True))


def test_the_table_is_tried_on_top_of_defaults_that_train(folder: Any) -> None:
    # Otherwise an option without effect would look supported: here the losses move.
    losses = [entry["loss"] for entry in logged(train(FusedDPOTrainer, folder, max_steps=2))[:-1]]
    assert abs(losses[1] - losses[0]) > 1e-4
    assert make_config(folder).bf16 is False
