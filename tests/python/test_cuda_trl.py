"""A few steps of TRL's trainers on a GPU log what they log on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")
pytest.importorskip("peft", reason="LoRA needs peft")

import peft
from cuda_cases import ON_GPU, need_device
from fusedpo.trl import FusedDPOTrainer, patch_trl
from trl import DPOTrainer
from trl_helpers import assert_equal_logs, logged, train

need_device()

SETUPS: dict[str, Any] = {
    "full fine-tuning": {},
    "softcap": {"family": "gemma2 softcap"},
    "head with bias": {"family": "phi head with bias"},
    "LoRA": {
        "keywords": {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
        "with_ref_model": False,
    },
    "LoRA on the head": {
        "keywords": {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])},
        "with_ref_model": False,
    },
    "a list of losses": {
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1],
    },
    "precompute": {"precompute_ref_log_probs": True, "with_ref_model": False},
}


def logs_of(trainer_class: Any, folder: Any, *, use_cpu: bool, **options: Any) -> Any:
    return logged(train(trainer_class, folder, max_steps=3, use_cpu=use_cpu, **options))


@pytest.mark.parametrize("setup", SETUPS)
def test_fused_trainer_logs_on_the_device_what_it_logs_on_cpu(setup: str, tmp_path: Any) -> None:
    here = logs_of(FusedDPOTrainer, tmp_path / "device", use_cpu=not ON_GPU, **SETUPS[setup])
    there = logs_of(FusedDPOTrainer, tmp_path / "cpu", use_cpu=True, **SETUPS[setup])
    assert_equal_logs(here, there, rel=1e-3)


@pytest.mark.parametrize("setup", ["full fine-tuning", "LoRA"])
def test_fused_trainer_logs_on_the_device_what_trl_logs_there(setup: str, tmp_path: Any) -> None:
    ours = logs_of(FusedDPOTrainer, tmp_path / "ours", use_cpu=not ON_GPU, **SETUPS[setup])
    theirs = logs_of(DPOTrainer, tmp_path / "trl", use_cpu=not ON_GPU, **SETUPS[setup])
    assert_equal_logs(ours, theirs, rel=1e-3)
    with patch_trl():
        patched = logs_of(DPOTrainer, tmp_path / "patched", use_cpu=not ON_GPU, **SETUPS[setup])
    assert_equal_logs(patched, theirs, rel=1e-3)


def test_bf16_autocast_over_fp32_weights_trains_on_the_device(tmp_path: Any) -> None:
    options: dict[str, Any] = {"use_cpu": not ON_GPU, "bf16": True, "learning_rate": 1e-3}
    ours = logs_of(FusedDPOTrainer, tmp_path / "ours", **options)
    theirs = logs_of(DPOTrainer, tmp_path / "trl", **options)
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert mine.keys() == other.keys()
        assert mine["loss"] == pytest.approx(other["loss"], abs=5e-3)
        assert mine["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=5e-3)
        assert mine["rewards/margins"] == pytest.approx(other["rewards/margins"], abs=5e-2)
