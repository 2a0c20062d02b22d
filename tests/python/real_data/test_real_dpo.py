"""Plain TRL and FusedDPOTrainer on trained weights, a real vocabulary and real preferences."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from datasets import Dataset
from fusedpo.trl import FusedDPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from trl import DPOConfig, DPOTrainer
from trl_helpers import assert_equal_logs, largest_difference, logged, one_thread  # noqa: F401

pytestmark = pytest.mark.real_data

HELD_OUT = 96


def read(path: pathlib.Path) -> list[Any]:
    with path.open(encoding="utf-8") as file:  # some texts contain U+2028: no splitlines
        return [json.loads(line) for line in file]


def config(folder: pathlib.Path, **options: Any) -> DPOConfig:
    # fp32: in bf16 both are right to two digits only, and nothing could be compared to 1e-4.
    return DPOConfig(
        output_dir=str(folder),
        bf16=False,
        logging_steps=1,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def held_out_margins(trainer: Any, rows: Dataset) -> torch.Tensor:
    """Return the reward margin of each held-out pair [pairs] as the policy stands now."""
    dataset = trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, "held-out")
    margins = []
    trainer.model.eval()
    for start in range(0, len(dataset), 16):
        stop = min(start + 16, len(dataset))
        batch = trainer.data_collator([dataset[i] for i in range(start, stop)])
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        ref_chosen, ref_rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        margins.append(trainer.beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))
    return torch.cat(margins)


@pytest.mark.usefixtures("one_thread")
def test_stories260k_thirty_steps_equal_trl_and_the_held_out_margin_rises(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = real_data / "models" / "stories260K"
    rows = read(real_data / "preferences" / "tinystories-vs-260k.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def build(trainer_class: Callable[..., Any]) -> Any:
        return trainer_class(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            ref_model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=config(
                tmp_path,
                max_steps=30,
                learning_rate=1e-4,
                per_device_train_batch_size=8,
                max_length=512,
            ),
            train_dataset=Dataset.from_list(rows[:-HELD_OUT]),
            processing_class=tokenizer,
        )

    theirs, ours = build(DPOTrainer), build(FusedDPOTrainer)
    held_out = Dataset.from_list(rows[-HELD_OUT:])
    before = held_out_margins(ours, held_out)
    theirs.train()
    ours.train()
    after = held_out_margins(ours, held_out)

    got, want = logged(ours), logged(theirs)
    assert len([entry for entry in want if "loss" in entry]) == 30
    print(f"largest difference in 30 steps: {largest_difference(got, want):.2e}")
    assert_equal_logs(got, want, rel=1e-4, abs_=0.0)
    train_margin = max(entry["rewards/margins"] for entry in want if "loss" in entry)
    rise = after - before
    error = rise.std() / HELD_OUT**0.5
    print(f"train margin {train_margin:.2f}; held-out rise {rise.mean():.3f} +- {error:.3f}")
    assert train_margin > 0.5
    assert rise.mean() > error


def test_qwen_vocabulary_five_steps_on_conversations_equal_trl(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    rows = read(real_data / "preferences" / "llamafactory-dpo-en.conversational.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / "qwen2.5")
    shape = Qwen2Config(
        vocab_size=151936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151645,
    )

    def run(trainer_class: Callable[..., Any]) -> list[dict[str, float]]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape)
        # A shared direction in all embeddings. It leaves every probability as it is and moves the
        # mean of the logits to about 1, as in trained models. Without it that mean is a sum of
        # 151,936 values of both signs, 4e-5 with an fp32 rounding error of 2e-7: nothing to compare
        # to 1e-4.
        model.get_input_embeddings().weight.data += 0.02 * torch.randn(shape.hidden_size)
        reference = AutoModelForCausalLM.from_config(shape)
        reference.load_state_dict(model.state_dict())
        trainer = trainer_class(
            model,
            ref_model=reference,
            args=config(
                tmp_path,
                max_steps=5,
                learning_rate=1e-3,
                per_device_train_batch_size=2,
                max_length=160,  # TRL scores every position: about ten passes over [positions, V]
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        return logged(trainer)

    want, got = run(DPOTrainer), run(FusedDPOTrainer)
    assert len([entry for entry in want if "loss" in entry]) == 5
    print(f"largest difference in 5 steps: {largest_difference(got, want):.2e}")
    assert_equal_logs(got, want, rel=1e-4, abs_=0.0)
    assert all(abs(entry["logits/chosen"]) > 0.1 for entry in want if "loss" in entry)
    losses = [entry["loss"] for entry in want if "loss" in entry]
    assert max(losses) - min(losses) > 0.05  # the steps do change the model


@pytest.mark.usefixtures("one_thread")
def test_200_steps_with_shared_prompts_follow_those_without(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = real_data / "models" / "stories260K"
    rows = read(real_data / "preferences" / "tinystories-vs-260k.jsonl")

    def run(share_prompts: bool) -> Any:
        trainer = FusedDPOTrainer(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=config(
                tmp_path,
                max_steps=200,
                learning_rate=1e-4,
                per_device_train_batch_size=2,
                max_length=256,
            ),
            train_dataset=Dataset.from_list(rows[:200]),
            processing_class=AutoTokenizer.from_pretrained(folder),
            # Scored once for both runs: the difference between the two is the policy's alone.
            ref_store=tmp_path / "refs",
            share_prompts=share_prompts,
        )
        trainer.train()
        return trainer

    packed, padded = run(True), run(False)
    got, want = logged(packed), logged(padded)
    assert len([entry for entry in want if "loss" in entry]) == 200
    computed, whole = (
        sum(entry.get(name, 0) for entry in packed.state.log_history)
        for name in ("tokens/computed", "tokens/padded")
    )
    losses = [entry["loss"] for entry in want if "loss" in entry]
    differences = [abs(entry["loss"] - loss) for entry, loss in zip(got, losses, strict=False)]
    print(f"losses differ by {max(differences):.2e} at most in 200 steps")
    print(f"{computed:.0f} tokens instead of {whole:.0f}")
    # These prompts are short: what is saved is the padding.
    assert computed < whole / 1.1
    # The sums of a step are formed in another order, and each step builds on the ones before.
    assert max(differences) < 1e-4
    assert_equal_logs(got, want, rel=1e-3, abs_=1e-4)
    assert losses[0] - min(losses) > 0.3
