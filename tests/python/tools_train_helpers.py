"""A tiny model on disk, preferences in a file, and configurations for `fusedpo train`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import pytest
from trl_helpers import make_model, make_pairs, make_tokenizer


def save_model(folder: pathlib.Path, seed: int = 0) -> str:
    make_model(seed=seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(path: pathlib.Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session", name="tiny")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration of two quick steps, without a strategy and an output_dir."""
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "model_name": save_model(folder / "model"),
        # Two thirds of the pairs have a prompt of their own, which may be held out.
        "dataset": write_rows(folder / "pairs.jsonl", make_pairs(24)),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than half of the time of a tiny run is its plot's."""
    monkeypatch.setattr("fusedpo.tools.train.run._plot", lambda *_: None)
