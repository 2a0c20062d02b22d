"""Tiny models, data and runs for the TRL tests: everything is made here, nothing is downloaded."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig
from trl_plain_head import install

install()

BEFORE_5 = Version(transformers.__version__).major < 5
VOCABULARY = 1024
_USED = 32  # as many ids as make_tokenizer has words
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
    "qwen3": ("Qwen3", {"head_dim": 8, "num_key_value_heads": 2}),
    "qwen3 tied": ("Qwen3", {"head_dim": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "gemma2 softcap": ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "gemma3": ("Gemma3Text", {"sliding_window": 8, "head_dim": 8}),
    "cohere logit_scale": ("Cohere", {"logit_scale": 0.25}),
    "granite logits_scaling": ("Granite", {"logits_scaling": 4.0}),
    "gpt2": ("GPT2", {}),
    "phi head with bias": ("Phi", {"num_key_value_heads": 2}),
    "falcon_h1 lm_head_multiplier": (
        "FalconH1",
        {
            "lm_head_multiplier": 0.5,
            "head_dim": 8,
            "mamba_d_ssm": 16,
            "mamba_n_heads": 2,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8},
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose minutes where others use the cores, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def record_scored_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of rows of each call of the head that runs on fusedpo."""
    rows: list[int] = []
    import fusedpo._head as head_module

    original = head_module.linear_token_logps

    def spy(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
        rows.append(labels.numel())
        return original(hidden, weight, labels, **options)

    monkeypatch.setattr(head_module, "linear_token_logps", spy)
    return rows


def shard_as_zero3(monkeypatch: Any, parameters: list[Any]) -> list[int]:
    """Make parameters look sharded by ZeRO-3 to the fused head; the list that is returned gets the
    number of parameters of each gathering.

    ZeRO-3 leaves a parameter of size 0 outside its gather context; that can be had without
    DeepSpeed. What DeepSpeed does with the gradient afterwards cannot, so ask for the gradients
    directly.
    """
    full = {p: p.data for p in parameters}
    gathered: list[int] = []

    @contextlib.contextmanager
    def gather(*wanted: Any) -> Iterator[None]:
        sharded = [p for p in wanted if p is not None and p.numel() == 0]
        gathered.append(len(sharded))
        for p in sharded:
            p.data = full[p]
        try:
            yield
        finally:
            for p in sharded:
                p.data = torch.empty(0)

    for p in parameters:
        p.data = torch.empty(0)
    monkeypatch.setattr("fusedpo._head.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr("fusedpo._head.maybe_gather_lm_head_ctx", gather)
    return gathered


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
    head = model.get_output_embeddings()
    # Probabilities far from uniform, and highest for words that the data has: else no prediction
    # would be right.
    head.weight.data *= 4
    head.weight.data[_USED:] *= 0.3
    if head.bias is not None:
        torch.nn.init.normal_(head.bias[:_USED])
    return model


# What DPOTrainer logs in every step, besides the loop's.
DPO_METRICS = {
    "entropy",
    "num_tokens",
    "logits/chosen",
    "logits/rejected",
    "mean_token_accuracy",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
}


def lora(**options: Any) -> peft.LoraConfig:
    # With a task, as most users' and all saved ones: its PeftModel has a forward of its own.
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options}
    return peft.LoraConfig(r=4, **options)


def lora_model() -> Any:
    # Trained a little: with the initial zeros in B, adapter and base model could not be told apart.
    torch.manual_seed(3)
    model = peft.get_peft_model(make_model(), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
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


def make_trainer(
    trainer_class: Any,
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
    """Return a trainer of a fresh tiny model; `options` go to DPOConfig, `keywords` to the
    trainer."""
    keywords = dict(keywords or {})
    if with_ref_model:
        keywords["ref_model"] = make_model(family)
    keywords.setdefault("processing_class", make_tokenizer())
    model = make_model(family) if model is None else model
    sequential = options.get("train_sampling_strategy") == "sequential"
    if sequential and BEFORE_5:  # which has no such option
        del options["train_sampling_strategy"]
        trainer_class = type(
            trainer_class.__name__, (trainer_class,), {"_get_train_sampler": _in_order}
        )
    # TRL before 1.15 does not, and makes another adapter each time.
    transformers.set_seed(0)
    return trainer_class(
        model,
        args=make_config(folder, **options),
        train_dataset=Dataset.from_list(make_pairs() if rows is None else rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        **keywords,
    )


def _in_order(trainer: Any, *_: Any) -> Any:
    return torch.utils.data.SequentialSampler(trainer.train_dataset)


def need_tied_adapters() -> None:
    if "ensure_weight_tying" not in inspect.signature(peft.LoraConfig).parameters:
        pytest.skip(f"PEFT {peft.__version__} does not tie adapters")


def train(trainer_class: Callable[..., Any], folder: Any, **arguments: Any) -> Any:
    """As `make_trainer`, and train."""
    trainer = make_trainer(trainer_class, folder, **arguments)
    trainer.train()
    return trainer


# Times, and what fusedpo logs besides TRL's metrics.
_NOT_COMPARED = ("runtime", "per_second", "total_flos", "train_loss", "tokens/")


def logged(trainer: Any) -> list[dict[str, float]]:
    """Return every logged value that TRL has, too, but the times; one dict for each log call."""
    return [
        {name: value for name, value in entry.items() if not any(t in name for t in _NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]


def assert_equal_logs(
    got: list[dict[str, float]],
    want: list[dict[str, float]],
    rel: float = 1e-4,
    abs_: float = 1e-6,
    rewards: float = 1e-4,
) -> None:
    """Rewards and margins start at 0, where only an absolute difference means anything."""
    assert len(got) == len(want)
    for step, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert mine.keys() == theirs.keys(), f"step {step}"
        for name, value in theirs.items():
            if name.endswith("rewards/accuracies") and _is_tie(theirs):
                continue
            near_zero = "rewards/" in name and "accuracies" not in name
            limit = max(rewards if near_zero else abs_, rel * abs(value))
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
