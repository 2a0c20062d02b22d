"""The estimate of memory: its exact parts, and the whole beside a measured peak."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("trl", reason="fusedpo.tools.train needs TRL")

import peft
import torch
from fusedpo.tools.train import resolve
from fusedpo.tools.train.memory import MemoryEstimate, estimate_memory
from tools_train_helpers import tiny_config, write_rows  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM
from trl_helpers import make_model, make_pairs, make_tokenizer


def estimate(tiny: dict[str, Any], **options: Any) -> MemoryEstimate:
    return estimate_memory(resolve({**tiny, "strategy": "dpo", "output_dir": "o", **options}))


def size(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def trained_once(model: Any) -> tuple[int, int, int]:
    """Bytes of weights, gradients and Adam's state after one step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    optimizer.step()
    state = [each for one in optimizer.state.values() for each in one.values() if each.dim()]
    return size(model.parameters()), size(p.grad for p in parameters), size(state)


def test_weights_gradients_and_optimizer_are_counted_exactly(tiny: dict[str, Any]) -> None:
    got = estimate(tiny)
    assert (got.weights, got.gradients, got.optimizer) == trained_once(make_model())
    assert got.total == sum(
        getattr(got, part)
        for part in ("weights", "reference", "gradients", "optimizer", "activations", "head")
    )


def test_of_lora_only_the_adapter_is_trained(tiny: dict[str, Any]) -> None:
    got = estimate(tiny, lora_r=4)
    run = resolve({**tiny, "strategy": "dpo", "output_dir": "o", "lora_r": 4})
    model = peft.get_peft_model(make_model(), run.peft)
    assert (got.weights, got.gradients, got.optimizer) == trained_once(model)


def test_a_reference_is_in_memory_only_without_a_store(tiny: dict[str, Any]) -> None:
    assert estimate(tiny).reference == 0
    assert estimate(tiny, ref_store=False).reference == estimate(tiny).weights
    assert estimate(tiny, ref_store=False, lora_r=4).reference == 0
    assert estimate({**tiny, "strategy": "simpo"}, strategy="simpo").reference == 0


def test_checkpointing_precision_and_length_count(tiny: dict[str, Any]) -> None:
    plain = estimate(tiny)
    assert estimate(tiny, gradient_checkpointing=True).activations < plain.activations
    assert estimate(tiny, max_length=32).activations == plain.activations // 2
    assert estimate(tiny, bf16=True).activations == plain.activations // 2
    assert estimate(tiny, dtype="bfloat16").weights == plain.weights // 2
    assert estimate(tiny, optim="sgd").optimizer == 0


MEASURED = """
import json, sys
import torch
from fusedpo.tools.train import train

torch.set_num_threads(1)
report = train(json.loads(sys.argv[1]), output_dir="out")
print(json.dumps([report.memory.total, report.peak_memory]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_estimate_is_near_a_measured_peak(tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    # Every sequence as long as max_length lets it be, which the estimate takes for granted.
    rows = [
        {**row, "chosen": row["chosen"] * 60, "rejected": row["rejected"] * 80}
        for row in make_pairs(8)
    ]
    options = {
        "strategy": "dpo",
        "model_name": "model",
        "dataset": write_rows(tmp_path / "rows.jsonl", rows),
        "max_steps": 2,
        "max_length": 256,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "share_prompts": False,
        "save_strategy": "no",
    }
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, json.dumps(options)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    estimated, peak = json.loads(result.stdout.strip().split("\n")[-1])
    assert 0.6 < estimated / peak < 1.4, (estimated / 2**20, peak / 2**20)
