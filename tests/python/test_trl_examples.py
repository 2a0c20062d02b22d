"""The scripts that users run first, run as they run them."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from trl_helpers import make_model, make_pairs, make_tokenizer

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def run(arguments: list[str], folder: pathlib.Path) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_training_script_trains_and_saves_with_trls_defaults(tmp_path: pathlib.Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps(row) + "\n" for row in make_pairs(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    output = run([str(EXAMPLES / "train_dpo_trl.py"), "model", "pairs.jsonl"], tmp_path)
    assert "rewards/margins" in output
    assert (tmp_path / "dpo_output" / "model.safetensors").exists()


def test_precompute_script_trains_on_the_store_that_it_made(tmp_path: pathlib.Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps(row) + "\n" for row in make_pairs(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    output = run([str(EXAMPLES / "precompute_then_train.py"), "model", "pairs.jsonl"], tmp_path)
    assert "0 of 16 records were there, 16 were scored" in output
    assert "train has 16 records in 8 rows; 16 found, 0 missing" in output
    assert (tmp_path / "dpo_output" / "model.safetensors").exists()


def test_demo_compares_both_runs_and_writes_plot_and_numbers(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib", reason="the demo draws a plot")
    output = run([str(EXAMPLES / "demo.py"), "--steps", "6", "--output", "out"], tmp_path)
    assert "largest difference" in output
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "out" / "demo.json").read_text(encoding="utf-8"))
    assert len(report["runs"]["trl"]["steps"]) == 6
    assert max(report["largest_differences"].values()) <= 1e-4
    assert report["runs"]["fusedpo"]["held_out_after"]["rewards/accuracies"] > 0.5
