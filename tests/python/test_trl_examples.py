"""The scripts that users run first, run as they run them."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from datasets import Dataset
from fusedpo.trl import patch_trl
from test_trl_patch_trainers import arguments, assert_within_contract, without_times
from trl_helpers import make_model, make_pairs, make_tokenizer, one_thread  # noqa: F401  a fixture

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


def test_cpo_orpo_script_trains_and_saves(tmp_path: pathlib.Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps(row) + "\n" for row in make_pairs(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    output = run([str(EXAMPLES / "cpo_orpo.py"), "simpo", "model", "pairs.jsonl"], tmp_path)
    assert "rewards/margins" in output
    assert (tmp_path / "simpo_output" / "model.safetensors").exists()


CPO_ORPO: dict[str, tuple[str, dict[str, Any]]] = {
    "CPO": ("CPO", {}),
    "CPO, label smoothing": ("CPO", {"label_smoothing": 0.2, "cpo_alpha": 0.5}),
    "CPO, hinge": ("CPO", {"loss_type": "hinge"}),
    "CPO, IPO": ("CPO", {"loss_type": "ipo"}),
    "SimPO": ("CPO", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.3}),
    "AlphaPO": ("CPO", {"loss_type": "simpo", "alpha": 0.25, "beta": 2.0}),
    "ORPO": ("ORPO", {}),
}


@pytest.mark.parametrize("name", CPO_ORPO)
def test_cpo_and_orpo_losses_equal_trls_experimental_trainers(
    name: str, tmp_path: pathlib.Path
) -> None:
    from fusedpo.trl import cpo_orpo

    kind, options = CPO_ORPO[name]
    experimental = importlib.import_module(f"trl.experimental.{kind.lower()}")
    config_class = getattr(experimental, f"{kind}Config")

    def log_of(trainer_class: Any) -> list[dict[str, float]]:
        trainer = trainer_class(
            model=make_model(),
            args=config_class(
                **arguments(tmp_path, eval_strategy="steps", eval_steps=3, **options)
            ),
            train_dataset=Dataset.from_list(make_pairs()),
            eval_dataset=Dataset.from_list(make_pairs(6, seed=1)),
            processing_class=make_tokenizer(),
        )
        trainer.train()
        return without_times(trainer)

    want = log_of(getattr(experimental, f"{kind}Trainer"))
    with patch_trl():
        got = log_of(getattr(cpo_orpo, f"Fused{kind}Trainer"))
    unlike = {"logits/chosen", "logits/rejected"}  # TRL's cover prompt and padding
    unlike |= {"logps/chosen", "logps/rejected", "log_odds_chosen", "log_odds_ratio"}
    theirs = [
        {k: v for k, v in entry.items() if k.removeprefix("eval_") not in unlike} for entry in want
    ]
    # AlphaPO's rewards are exponentials: tens of nats here.
    assert_within_contract(got, theirs, subtracted=50.0 if name == "AlphaPO" else 10.0)
    losses = [entry["loss"] for entry in want if "loss" in entry]
    assert max(losses) - min(losses) > 1e-2
