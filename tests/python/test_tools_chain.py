"""From raw preferences to a compared sweep, from the command line only: convert, lint, precompute,
train, plot, diagnose, sweep."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("trl", reason="the training is TRL's")
pytest.importorskip("typer", reason="the command line is typer's")
pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")

from trl_helpers import make_model, make_pairs, make_tokenizer

SETTINGS = {
    "strategy": "dpo",
    "model_name": "model",
    "dataset": "clean.jsonl",
    "eval_split": 0.25,
    "ref_store": "refs",
    "ref_miss": "error",  # whatever precompute has not scored stops the training
    "output_dir": "run",
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "learning_rate": 3e-3,
    "beta": 0.1,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "kl_prompts": 8,
    "kl_max_new_tokens": 8,
}


def share_gpt(row: dict[str, str]) -> dict[str, Any]:
    """The form in which LLaMA-Factory has preferences."""
    sides = {side: {"from": "gpt", "value": row[side].strip()} for side in ("chosen", "rejected")}
    return {"conversations": [{"from": "human", "value": row["prompt"]}], **sides}


class Shell:
    """Runs `fusedpo` in a folder; what it reports is read as a program would."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "fusedpo", *arguments, "--json"],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        told = f"fusedpo {' '.join(arguments)}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
        assert result.returncode == code, told
        report: dict[str, Any] = json.loads(result.stdout)
        return report


def test_every_tool_takes_what_the_one_before_has_made(tmp_path: pathlib.Path) -> None:
    fusedpo = Shell(tmp_path)
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [share_gpt(row) for row in make_pairs(64)]
    rows.append(rows[0] | {"chosen": rows[0]["rejected"]})  # both sides are one: lint's to find
    (tmp_path / "raw.json").write_text(json.dumps(rows), encoding="utf-8")

    converted = fusedpo("convert", "raw.json", "pairs.jsonl", "--to", "conversational")
    assert converted["form"] == "sharegpt"
    assert converted["rows_written"] == len(rows)

    linted = fusedpo(
        *("lint", "pairs.jsonl", "--tokenizer", "model", "--fix", "clean.jsonl"), code=1
    )
    errors = [each["rule"] for each in linted["findings"] if each["severity"] == "error"]
    assert errors == ["identical_sides"]
    removed = sum(each["count"] for each in linted["findings"] if each["removable"])
    assert 0 < removed < len(rows)

    scored = fusedpo(
        *("precompute", "--model", "model", "--data", "clean.jsonl", "--output", "refs"),
        *("--autocast", "no"),
    )
    assert scored["rows"] == len(rows) - removed
    assert scored["scored"] == scored["records"] > 0

    (tmp_path / "dpo.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    (trained,) = fusedpo("train", "dpo.json")["stages"]
    assert trained["data"]["train_rows"] + trained["data"]["eval_rows"] == scored["rows"]
    assert trained["margin"] > 0
    assert trained["kl"]["standard_error"] > 0

    drawn = fusedpo("plot", "run", "--output", "run.svg")
    assert {"loss", "margin", "rewards", "log-probabilities"} <= set(drawn["panels"])
    assert (tmp_path / "run.svg").stat().st_size > 10_000

    report = fusedpo("diagnose", "run", "--data", "clean.jsonl", "--reference", "refs")
    assert report["last_step"] == SETTINGS["max_steps"]
    assert not report["not_checked"]
    assert "loss_stuck_at_start" in report["passed"]

    swept = fusedpo(
        *("sweep", "dpo.json", "--beta", "0.05,0.5", "--loss", "sigmoid,simpo"),
        *("--output-dir", "sweep"),
    )
    assert swept["ref_store"] == "refs"
    made = {(run["loss"], run["beta"]): run["margin"] for run in swept["runs"]}
    assert set(made) == {(loss, beta) for loss in ("sigmoid", "simpo") for beta in (0.05, 0.5)}
    assert made["sigmoid", 0.5] > made["sigmoid", 0.05]
    assert (tmp_path / "sweep" / "plot.png").stat().st_size > 10_000
