"""patch_trl under every trainer of TRL that uses the fused head: each logs the same numbers."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import peft
import pytest

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from fusedpo.trl.versions import PATCH, at_least

if not at_least(1, 15):
    pytest.skip(f"patch_trl needs TRL {PATCH.text}", allow_module_level=True)

from datasets import Dataset
from fusedpo.trl import patch_trl
from trl import (
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl_helpers import (
    logged,
    make_config,
    make_model,
    make_pairs,
    make_tokenizer,
    one_thread,  # noqa: F401  a fixture
    record_scored_rows,
    train,
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}
PAIRS, OTHER_PAIRS = make_pairs(), make_pairs(6, seed=1)


def arguments(folder: pathlib.Path, **more: Any) -> dict[str, Any]:
    config = make_config(folder)
    names = ("bf16", "learning_rate", "max_steps", "per_device_train_batch_size", "logging_steps")
    names += ("per_device_eval_batch_size", "gradient_checkpointing", "use_cpu", "save_strategy")
    names += ("report_to", "disable_tqdm")
    return {"output_dir": str(folder)} | {n: getattr(config, n) for n in names} | more


def lora(*targets: str) -> dict[str, Any]:
    return {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", *targets])}


def dpo(folder: pathlib.Path, adapter: Any = None, **options: Any) -> Any:
    return train(DPOTrainer, folder, keywords=adapter, with_ref_model=adapter is None, **options)


def sft_rows(pairs: list[dict[str, str]]) -> Dataset:
    return Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs])


def sft(folder: pathlib.Path, family: str = "llama", adapter: Any = None, **options: Any) -> Any:
    trainer = SFTTrainer(
        make_model(family),
        args=SFTConfig(**arguments(folder, **options)),
        train_dataset=sft_rows(PAIRS),
        eval_dataset=sft_rows(OTHER_PAIRS),
        processing_class=make_tokenizer(),
        **(adapter or {}),
    )
    trainer.train()
    return trainer


def kto_rows(pairs: list[dict[str, str]]) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
            for r in pairs
            for side in ("chosen", "rejected")
        ]
    )


def kto(folder: pathlib.Path, adapter: Any = None, **options: Any) -> Any:
    trainer = KTOTrainer(
        make_model(),
        ref_model=None if adapter else make_model(),
        args=KTOConfig(**arguments(folder, **options)),
        train_dataset=kto_rows(PAIRS),
        eval_dataset=kto_rows(OTHER_PAIRS),
        processing_class=make_tokenizer(),
        **(adapter or {}),
    )
    trainer.train()
    return trainer


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def online(
    trainer_class: Any,
    config_class: Any,
    folder: pathlib.Path,
    adapter: Any = None,
    **options: Any,
) -> Any:
    make_model().save_pretrained(folder / "model")
    defaults = {"max_steps": 3, "num_generations": 2, "max_completion_length": 6, "beta": 0.1}
    trainer = trainer_class(
        str(folder / "model"),
        reward_funcs=vowels,
        args=config_class(**arguments(folder, **{**defaults, **options})),
        train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in PAIRS]),
        eval_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in OTHER_PAIRS]),
        processing_class=make_tokenizer(),
        **(adapter or {}),
    )
    trainer.train()
    return trainer


def grpo(folder: pathlib.Path, **options: Any) -> Any:
    return online(GRPOTrainer, GRPOConfig, folder, **options)


def rloo(folder: pathlib.Path, **options: Any) -> Any:
    return online(RLOOTrainer, RLOOConfig, folder, **options)


RUNS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "DPO": (dpo, {}),
    "DPO with WPO weights": (dpo, {"use_weighting": True, "loss_type": ["ipo"]}),
    "SFT": (sft, {"gradient_accumulation_steps": 2, **EVALUATION}),
    "SFT, chunked_nll": (sft, {"loss_type": "chunked_nll"}),
    "SFT, dft": (sft, {"loss_type": "dft", **EVALUATION}),
    "SFT, label smoothing": (sft, {"label_smoothing_factor": 0.1}),
    "SFT, mixture of experts": (sft, {"family": "mixtral", "router_aux_loss_coef": 0.5}),
    "SFT, LoRA under a softcap": (sft, {"family": "gemma2 softcap", "adapter": lora()}),
    "KTO": (kto, EVALUATION),
    "KTO, apo_zero_unpaired": (kto, {"loss_type": "apo_zero_unpaired", **EVALUATION}),
    "KTO, LoRA": (kto, {"adapter": lora()}),
    "KTO, precomputed reference": (kto, {"precompute_ref_log_probs": True}),
    "GRPO": (grpo, {"temperature": 0.7, **EVALUATION}),
    "GRPO, LoRA": (grpo, {"adapter": lora()}),
    "GRPO, head in fp32, uncertain tokens only": (
        grpo,
        {"cast_lm_head_to_fp32": True, "top_entropy_quantile": 0.5},
    ),
    "GRPO, entropy bonus": (grpo, {"entropy_coef": 0.1, "top_entropy_quantile": 0.5}),
    "GRPO, adaptive entropy bonus": (grpo, {"use_adaptive_entropy": True, "entropy_target": 5.0}),
    "GRPO, sequence-level ratios, two epochs": (
        grpo,
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
    ),
    "RLOO": (rloo, EVALUATION),
    "RLOO, LoRA": (rloo, {"temperature": 0.7, "adapter": lora()}),
}


def without_times(trainer: Any) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if "time" not in k} for entry in logged(trainer)]


def assert_within_contract(
    got: list[dict[str, float]], want: list[dict[str, float]], subtracted: float = 10.0
) -> None:
    """Loss and metrics 1e-5, norms of gradients 1e-4, relative.

    Rewards and divergences are differences of numbers of the size `subtracted`, in nats, and an
    advantage-weighted loss may cancel to 0: their rounding errors are absolute.
    """
    assert len(got) == len(want)
    for step, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert mine.keys() == theirs.keys(), f"step {step}"
        for name, value in theirs.items():
            floor = 1e-6 * subtracted if "rewards/" in name or "kl" in name else 1e-6
            limit = max((1e-4 if "grad_norm" in name else 1e-5) * abs(value), floor)
            assert abs(mine[name] - value) <= limit, f"step {step}: {name} {mine[name]} != {value}"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's, about its own options
@pytest.mark.parametrize("name", RUNS)
def test_every_logged_value_is_the_same_with_the_patch(
    name: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored_rows = record_scored_rows(monkeypatch)
    run, options = RUNS[name]
    want = without_times(run(tmp_path, **options))
    assert not scored_rows
    with patch_trl():
        got = without_times(run(tmp_path, **options))
    assert scored_rows
    assert max(entry.get("grad_norm", 0.0) for entry in want) > 1e-3  # it does train
    assert_within_contract(got, want)


@pytest.mark.parametrize("run", [dpo, sft, kto, grpo, rloo])
def test_an_adapter_on_the_head_is_refused_by_trl_under_the_patch_too(
    run: Any, tmp_path: pathlib.Path
) -> None:
    # TRL's head never reads the adapter, so the patch cannot apply it.
    with patch_trl(), pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        run(tmp_path, adapter=lora("lm_head"))
