"""examples/from_scratch.py: a page of DPO gives the losses of TRL's trainer."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

pytest.importorskip("trl", reason="compared with TRL's trainer")

from test_loss_examples import EXAMPLES, load
from test_trl_examples import run
from trl import DPOTrainer
from trl_helpers import (
    make_model,
    make_pairs,
    make_tokenizer,
    make_trainer,
    one_thread,  # noqa: F401  a fixture
)

STEPS = 5
RATE = 3e-3


def losses_of_trl(folder: pathlib.Path, **options: Any) -> list[float]:
    trainer = make_trainer(
        DPOTrainer,
        folder,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        **options,
    )
    trainer.train()
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "cdpo"])
def test_losses_are_those_of_the_trainer(loss_type: str, tmp_path: pathlib.Path) -> None:
    example = load("from_scratch")
    tokenizer = make_tokenizer()
    rows = [example.tokenize(tokenizer, row) for row in make_pairs()]
    model = make_model()
    store = example.cache_reference(model, "tiny", rows, tmp_path / "refs")
    options: dict[str, Any] = {"loss_type": [loss_type]}
    if loss_type == "cdpo":
        # TRL has it under no name of its own; aot is the same where a batch is one pair.
        options = {"loss_type": ["aot"], "label_smoothing": 0.1, "per_device_train_batch_size": 1}
    batch = options.get("per_device_train_batch_size", 4)
    got = example.train(model, store, rows, loss_type, steps=STEPS, batch=batch, learning_rate=RATE)
    want = losses_of_trl(tmp_path / "trl", **options)
    assert got == pytest.approx(want, rel=1e-4)
    assert max(want) - min(want) > 0.01 * max(want)


def test_the_script_trains_and_scores_the_reference_once(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = make_pairs(12)
    lines = [json.dumps(row) + "\n" for row in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    output = run([str(EXAMPLES / "from_scratch.py"), "model", "pairs.jsonl"], tmp_path)
    assert "0 pairs were in refs" in output
    assert "loss 0.6931  margin 0.0000" in output

    example = load("from_scratch")
    rows = [example.tokenize(tokenizer, row) for row in pairs]
    example.cache_reference(model, "model", rows, tmp_path / "refs")
    assert ", 0 were scored" in capsys.readouterr().out
