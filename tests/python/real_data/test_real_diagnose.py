"""`fusedpo diagnose` on trainings of a small model that was really trained, with real stories."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the runs are TRL's")

from datasets import Dataset
from fusedpo.tools.diagnose import diagnose
from fusedpo.trl import FusedDPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig
from trl_helpers import one_thread  # noqa: F401  a fixture

pytestmark = pytest.mark.real_data


def findings(real_data: pathlib.Path, output: pathlib.Path, **options: Any) -> set[str]:
    folder = real_data / "models" / "stories260K"
    with (real_data / "preferences" / "tinystories-vs-260k.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    trainer = FusedDPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(output),
            bf16=False,
            max_steps=30,
            per_device_train_batch_size=8,
            max_length=512,
            logging_steps=1,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return {finding.rule for finding in diagnose(output).findings}


@pytest.mark.usefixtures("one_thread")
def test_a_large_learning_rate_displaces_likelihood_and_the_advised_fix_mends_it(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert "chosen_logps_fall" in findings(real_data, tmp_path / "steep", learning_rate=5e-4)
    mended: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}
    assert not findings(real_data, tmp_path / "mended", learning_rate=1e-4, **mended)
