"""Tiny models, data and runs for the TRL tests: everything is made here, nothing is downloaded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig
from trl_plain_head import install

install()

VOCABULARY = 96
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_SUBJECTS = ["the cat", "a dog", "my friend", "the old king", "one bird"]
_VERBS = ["sees", "likes", "follows", "paints", "forgets"]
_OBJECTS = ["a tree", "the river", "some bread", "his red hat", "the long road"]
# One line per thing that the head has to get right.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "gemma2 softcap": ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "cohere logit_scale": ("Cohere", {"logit_scale": 0.25}),
    "granite logits_scaling": ("Granite", {"logits_scaling": 4.0}),
    "gpt2": ("GPT2", {}),
    "phi head with bias": ("Phi", {"num_key_value_heads": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose minutes where others use the cores, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(family: str = "llama", seed: int = 0, std: float = 0.2) -> Any:
    """Return a model with weights so large that its logits differ from token to token."""
    name, options = FAMILIES[family]
    sizes = dict(_SIZES)
    if name == "GPT2":
        sizes = {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
        }
    config = getattr(transformers, f"{name}Config")(**{**sizes, **_SPECIAL, **options})
    config.initializer_range = std
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


def make_pairs(count: int = 16, seed: int = 0) -> list[dict[str, str]]:
    """Return preferences in which the chosen sentence repeats the subject of the prompt."""
    random_state = random.Random(seed)
    rows = []
    for _ in range(count):
        subject, other = random_state.sample(_SUBJECTS, 2)
        verb, thing = random_state.choice(_VERBS), random_state.choice(_OBJECTS)
        rows.append(
            {
                "prompt": f"who {verb} {thing} ?",
                "chosen": f" {subject} {verb} {thing} .",
                "rejected": f" {other} {verb} .",
            }
        )
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<eos>", "<unk>", "<user>", "<bot>"]
    )
    words = [" ".join(row.values()) for row in make_pairs(200)]
    tokenizer.train_from_iterator(words, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}"
        "{{ m['content'] }}{{ ' <eos> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
    )
    return fast


def conversational(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [
        {name: [{"role": roles[name], "content": text.strip()}] for name, text in row.items()}
        for row in rows
    ]


def make_config(folder: Any, **options: Any) -> DPOConfig:
    """Return a DPOConfig in fp32 that logs each step, for six steps of four pairs."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "bf16": False,
        "learning_rate": 3e-3,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return DPOConfig(**{**defaults, **options})


def train(
    trainer_class: Callable[..., Any],
    folder: Any,
    *,
    family: str = "llama",
    rows: list[Any] | None = None,
    eval_rows: list[Any] | None = None,
    keywords: dict[str, Any] | None = None,
    model: Any = None,
    with_ref_model: bool = True,
    **options: Any,
) -> Any:
    """Train a fresh tiny model and return the trainer."""
    keywords = dict(keywords or {})
    if with_ref_model:
        keywords["ref_model"] = make_model(family)
    model = make_model(family) if model is None else model
    # TRL before 1.15 does not, and makes another adapter each time.
    transformers.set_seed(0)
    trainer = trainer_class(
        model,
        args=make_config(folder, **options),
        train_dataset=Dataset.from_list(make_pairs() if rows is None else rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=make_tokenizer(),
        **keywords,
    )
    trainer.train()
    return trainer


_TIMES = ("runtime", "per_second", "total_flos", "train_loss")


def logged(trainer: Any) -> list[dict[str, float]]:
    """Return every logged value but the times, one dict for each log call."""
    return [
        {name: value for name, value in entry.items() if not any(t in name for t in _TIMES)}
        for entry in trainer.state.log_history
    ]


def assert_equal_logs(
    got: list[dict[str, float]], want: list[dict[str, float]], rel: float = 1e-4, abs_: float = 1e-6
) -> None:
    """Rewards and margins start at 0, where only an absolute difference means anything: 1e-4."""
    assert len(got) == len(want)
    for step, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert mine.keys() == theirs.keys(), f"step {step}"
        for name, value in theirs.items():
            if name.endswith("rewards/accuracies") and _is_tie(theirs):
                continue
            near_zero = "rewards/" in name and "accuracies" not in name
            limit = max(1e-4 if near_zero else abs_, rel * abs(value))
            assert abs(mine[name] - value) <= limit, f"step {step}: {name} {mine[name]} != {value}"


def _is_tie(entry: dict[str, float]) -> bool:
    # Before the first step the policy is the reference. If that was precomputed in batches of
    # another padding, the rewards are rounding errors, and the accuracy is the sign of rounding
    # errors.
    margins = [value for name, value in entry.items() if name.endswith("rewards/margins")]
    return 0 < abs(margins[0]) < 1e-5


def largest_difference(got: list[dict[str, float]], want: list[dict[str, float]]) -> float:
    """Return the largest relative difference, absolute for rewards and margins."""
    worst = 0.0
    for mine, theirs in zip(got, want, strict=True):
        for name, value in theirs.items():
            near_zero = "rewards/" in name and "accuracies" not in name
            scale = 1.0 if near_zero else max(abs(value), 1e-12)
            worst = max(worst, abs(mine[name] - value) / scale)
    return worst
