"""FusedDPOTrainer against DPOTrainer on the same steps: loss, every gradient, every metric.

All losses and their options are compared in test_losses_vs_trl, on one batch each.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

import transformers
import trl
from packaging.version import Version
from shadow_cases import shadow
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_helpers import (
    FAMILIES,
    conversational,
    lora,
    lora_model,
    make_model,
    make_pairs,
    one_thread,  # noqa: F401  a fixture
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_as_under_trl(family: str, tmp_path: Any) -> None:
    experts = family in ("mixtral", "qwen3_moe", "gpt_oss")
    # A thousandth by default, which would hide the gradient of the router loss.
    options = {"router_aux_loss_coef": 0.2} if experts else {}
    packs = family != "falcon_h1 lm_head_multiplier"  # it has a recurrence
    _, run = shadow(tmp_path, family=family, shares_prompts=packs, **options)
    assert all(("aux_loss" in call.metrics) == experts for call in run.calls)


def test_experts_without_a_router_loss(tmp_path: Any) -> None:
    _, run = shadow(tmp_path, family="mixtral", router_aux_loss_coef=0.0)
    assert all("aux_loss" not in call.metrics for call in run.calls)


# ---- adapters -----------------------------------------------------------------------------------


ADAPTERS: dict[str, Any] = {
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True),
    "rsLoRA with trained embeddings": lambda: lora(
        use_rslora=True, modules_to_save=["embed_tokens"]
    ),
    "trained norms": lambda: lora(modules_to_save=["norm"]),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


def lora_setup(adapter: str = "LoRA") -> dict[str, Any]:
    torch.manual_seed(5)
    return {"keywords": {"peft_config": ADAPTERS[adapter]()}, "with_ref_model": False}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_trains_as_under_trl(adapter: str, tmp_path: Any) -> None:
    if adapter in ("prompt tuning", "p-tuning") and Version(trl.__version__) < Version("1.15"):
        pytest.skip("TRL before 1.15 fails on virtual tokens")
    packs = adapter not in ("prompt tuning", "p-tuning", "prefix tuning")
    shadow(tmp_path, lambda: lora_setup(adapter), noise=0.3, shares_prompts=packs)


def test_adapter_under_a_tied_head(tmp_path: Any) -> None:
    shadow(tmp_path, lora_setup, family="llama tied", noise=0.3)


def test_trained_adapter_has_its_initial_state_as_reference(tmp_path: Any) -> None:
    trainer, _ = shadow(
        tmp_path, lambda: {"model": lora_model(), "with_ref_model": False}, noise=0.3
    )
    assert "ref" in trainer.model.peft_config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_adapter_on_weights_of_four_bits(dtype: torch.dtype, tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    make_model().save_pretrained(tmp_path / "model")
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )

    def setup() -> dict[str, Any]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=four_bits, device_map="cpu"
        )
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
        return lora_setup() | {"model": model}

    def cast_adapters(trainer: Any) -> None:
        adapters = [p for p in trainer.model.parameters() if p.requires_grad]
        assert {p.dtype for p in adapters} == {torch.bfloat16}, "TRL keeps them in bf16"
        for parameter in adapters:
            parameter.data = parameter.data.to(dtype)

    shadow(tmp_path, setup, noise=0.3, before_training=cast_adapters)


# ---- how a step is run --------------------------------------------------------------------------


class PositionsCollator(DataCollatorForPreference):  # type: ignore[misc]
    """A user's collator: pads to a multiple of 8 and names the positions."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return batch


WAYS: dict[str, Any] = {
    "conversational data": lambda: {"rows": conversational(make_pairs())},
    "batches of other sizes": lambda: {"rows": make_pairs(5), "eval_rows": make_pairs(6, seed=1)},
    "collator of the user": lambda: {
        "keywords": {"data_collator": PositionsCollator(pad_token_id=0, pad_to_multiple_of=8)}
    },
    "padding to a multiple": lambda: {"pad_to_multiple_of": 8},
    "keep_start": lambda: {"max_length": 9, "truncation_mode": "keep_start"},
    "keep_end": lambda: {"max_length": 9, "truncation_mode": "keep_end"},
    "accumulation": lambda: {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": lambda: {"gradient_checkpointing": True},
    "checkpointing with LoRA": lambda: {"gradient_checkpointing": True, **lora_setup()},
    "reentrant checkpointing": lambda: {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "reentrant checkpointing with LoRA": lambda: {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        **lora_setup(),
    },
    # Graphs are captured, not compiled: that takes long, and test_compile does it.
    "torch.compile": lambda: {
        "torch_compile": True,
        "torch_compile_backend": "eager",
        "max_steps": 1,
    },
    "synchronised reference": lambda: {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "precompute": lambda: {"precompute_ref_log_probs": True, "with_ref_model": False},
    "precompute with LoRA": lambda: {
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": 3,
        **lora_setup(),
    },
    "evaluation": lambda: {
        "eval_rows": make_pairs(6, seed=1),
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "losses with weights": lambda: {
        "loss_type": ["sigmoid", "ipo", "sft"],
        "loss_weights": [0.7, 0.1, 0.5],
        "ld_alpha": 0.5,
    },
    "weighted pairs and another divergence": lambda: {
        "loss_type": ["sigmoid", "robust"],
        "label_smoothing": 0.1,
        "f_divergence_type": "js_divergence",
        "use_weighting": True,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_way_to_train_gives_what_trl_gives(way: str, tmp_path: Any) -> None:
    noise = 0.3 if "LoRA" in way else 0.1
    packs = way != "collator of the user"  # its batches have more than token ids
    _, run = shadow(tmp_path, WAYS[way], noise=noise, shares_prompts=packs)
    modes = [call.mode for call in run.calls]
    assert ("eval" in modes) == (way == "evaluation")
    assert len(run.calls) > len(run.gradients) or way not in ("accumulation", "evaluation")
