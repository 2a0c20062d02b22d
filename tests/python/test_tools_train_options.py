"""Configurations of `fusedpo train`: both spellings, and what is refused before anything runs."""

from __future__ import annotations

import json
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("trl", reason="fusedpo.tools.train needs TRL")

from fusedpo.tools.train import Resolved, requirements, resolve
from fusedpo.tools.train.options import ALIASES, read_config
from fusedpo.tools.train.strategies import strategies
from tools_train_helpers import tiny_config  # noqa: F401

BASE = {"strategy": "dpo", "model_name": "m", "dataset": "pairs.jsonl", "output_dir": "out"}

# Every key of the strategy form: its value, and what it becomes.
SHORT_FORM: dict[str, tuple[Any, Callable[[Resolved], Any], Any]] = {
    "strategy": ("ipo", lambda r: r.args.loss_type, ["ipo"]),
    "task": ("text-generation", lambda r: r.strategy.name, "dpo"),
    "model_name": ("some/model", lambda r: r.model, "some/model"),
    "dataset": ("hh.jsonl", lambda r: r.data["dataset_name"], "hh.jsonl"),
    "provider": ("huggingface", lambda r: r.settings.provider, "huggingface"),
    "num_train_epochs": (2, lambda r: r.args.num_train_epochs, 2),
    "per_device_train_batch_size": (3, lambda r: r.args.per_device_train_batch_size, 3),
    "gradient_accumulation_steps": (5, lambda r: r.args.gradient_accumulation_steps, 5),
    "learning_rate": (2e-6, lambda r: r.args.learning_rate, 2e-6),
    "beta": (0.3, lambda r: r.args.beta, 0.3),
    "loss_type": ("hinge", lambda r: r.args.loss_type, ["hinge"]),
    "lora_r": (4, lambda r: r.peft.r, 4),
    "lora_alpha": (9, lambda r: r.peft.lora_alpha, 9),
    "lora_dropout": (0.2, lambda r: r.peft.lora_dropout, 0.2),
    "bf16": (True, lambda r: r.args.bf16, True),
    "max_seq_length": (77, lambda r: r.args.max_length, 77),
    "warmup_ratio": (0.1, lambda r: r.args.get_warmup_steps(50), 5),
    "eval_split": (0.2, lambda r: r.settings.eval_split, 0.2),
}


@pytest.mark.parametrize("key", SHORT_FORM)
def test_each_key_of_the_short_form_arrives(key: str) -> None:
    value, read, want = SHORT_FORM[key]
    assert read(resolve({**BASE, key: value})) == want


def test_use_4bit_becomes_a_quantisation_under_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    with_bitsandbytes(monkeypatch)
    run = resolve({**BASE, "use_4bit": True, "lora_r": 4})
    assert run.quantization.load_in_4bit
    assert run.peft.r == 4
    assert run.as_dict()["quantization"]["load_in_4bit"] is True


def with_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has it; what it would do there is not part of these tests."""
    import transformers.integrations

    real = requirements.find_spec
    monkeypatch.setattr(requirements, "has_accelerator", lambda: True)
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: name == "bitsandbytes" or real(name)
    )
    monkeypatch.setattr(
        transformers.integrations, "validate_bnb_backend_availability", lambda **_: True
    )
    monkeypatch.setattr(
        "transformers.utils.quantization_config.BitsAndBytesConfig.post_init", lambda self: None
    )


def test_trls_own_names_arrive() -> None:
    run = resolve(
        {
            "strategy": "dpo",
            "model_name_or_path": "m",
            "model_revision": "v1",
            "dtype": "bfloat16",
            "attn_implementation": "eager",
            "dataset_name": "some/data",
            "dataset_test_split": "validation",
            "use_peft": True,
            "lora_target_modules": ["q_proj"],
            "max_length": 99,
            "warmup_steps": 7,
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1.0, 0.5],
            "lr_scheduler_type": "cosine",
            "model_init_kwargs": {"use_kernels": False},
        }
    )
    assert (run.model, run.settings.eval_split) == ("m", "validation")
    assert run.model_options == {
        "revision": "v1",
        "dtype": "bfloat16",
        "attn_implementation": "eager",
        "use_kernels": False,
    }
    assert run.args.model_init_kwargs == run.model_options
    assert run.peft.target_modules == {"q_proj"}
    assert (run.args.max_length, run.args.warmup_steps) == (99, 7)
    assert (run.args.loss_type, run.args.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])
    assert run.args.lr_scheduler_type == "cosine"
    assert run.output_dir == "m-dpo"


@pytest.mark.parametrize("name", strategies())
def test_every_strategy_has_a_trainer_and_its_loss(name: str) -> None:
    options = {"label_smoothing": 0.1} if name in ("exo_pair", "robust", "cdpo") else {}
    run = resolve({**BASE, "strategy": name, **options})
    assert type(run.args).__name__.lower().startswith(run.strategy.trainer)
    for key, value in run.strategy.fixed.items():
        assert getattr(run.args, key) == value


def test_the_reference_store_is_the_default_of_dpo_alone() -> None:
    assert resolve(BASE).uses_store
    assert resolve(BASE).args.precompute_ref_log_probs
    assert resolve({**BASE, "ref_store": "refs"}).uses_store
    assert not resolve({**BASE, "ref_store": False}).uses_store
    assert not resolve({**BASE, "sync_ref_model": True}).uses_store
    assert not resolve({**BASE, "strategy": "kto"}).uses_store


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rte": 1e-4}, "'learning_rte' is no option .* Did you mean learning_rate"),
        ({"use_4bits": True}, "Did you mean use_4bit"),
        ({"simpo_gamma": 1.0}, "'simpo_gamma' is no option .* strategy 'dpo'"),
        ({"strategy": "dpoo"}, "strategy must be one of .*; got 'dpoo'. Did you mean dpo"),
        ({"strategy": None}, "strategy must be one of .*; got None"),
        ({"model_name": None}, "must name the model: model_name"),
        ({"dataset": ""}, "must name the dataset: dataset"),
        ({"max_seq_length": 5, "max_length": 5}, "max_seq_length and max_length are the same"),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "warmup_ratio and warmup_steps are the same"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio must be a number in \[0, 1\); got 1.5"),
        ({"strategy": "ipo", "loss_type": "hinge"}, "strategy 'ipo' has loss_type"),
        ({"strategy": "cpo", "loss_type": "apo_zero"}, "loss_type of CPO must be one of"),
        ({"strategy": "cpo", "alpha": 0.5}, "AlphaPO is 'simpo'"),
        (
            {"strategy": "cpo", "loss_type": "hinge", "label_smoothing": 0.1},
            "no option of the loss",
        ),
        ({"loss_type": "dpoo"}, "DPOConfig.loss_type must be among"),
        ({"beta": "high"}, r"beta must be float; got 'high' \(str\)"),
        ({"num_train_epochs": True}, "num_train_epochs must be float"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size must be int"),
        ({"task": "classification"}, "task must be one of .*; got 'classification'"),
        ({"provider": "openai"}, "provider must be one of"),
        ({"eval_split": 1.5}, "eval_split must be a share"),
        ({"eval_split": True}, "eval_split must be float"),
        ({"eval_strategy": "steps"}, "eval_strategy needs rows to evaluate: set eval_split"),
        ({"kl_prompts": -1}, "kl_prompts must be at least 0"),
        ({"use_peft": False, "lora_r": 4}, "use_peft is false, and lora_r"),
        ({"use_4bit": True}, "use_4bit needs LoRA"),
        ({"strategy": "sft", "ref_store": "refs"}, "ref_store is an option of the DPO losses"),
        ({"dtype": "float32", "model_init_kwargs": {"dtype": "float16"}}, "dtype must not be in"),
        ({"padding_free": True}, "DPOConfig.padding_free must be False"),
        ({"strategy": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1, which loss_type"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "ignores, in TRL, too. Leave out"),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1, which loss_type"),
        (
            {"ref_store": False, "precompute_ref_log_probs": True},
            "ref_store is false, and precompute_ref_log_probs is true",
        ),
        (
            {"ref_store": "refs", "precompute_ref_log_probs": False},
            "ref_store is 'refs', and precompute_ref_log_probs is false",
        ),
        (
            {"ref_store": True, "precompute_ref_log_probs": False},
            "ref_store is True, and precompute_ref_log_probs is false",
        ),
        ({"lora_r": 4, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is an option of use_4"),
        ({"lora_r": 4, "use_bnb_nested_quant": True}, "use_bnb_nested_quant is an option of use"),
        *(
            ({"strategy": name, "beta": beta}, f"beta must be above 0; got {beta}")
            for name in ("simpo", "cpo", "orpo", "kto")
            for beta in (0.0, -0.1)
        ),
        ({"max_seq_length": 0}, "max_seq_length must be at least 1; got 0"),
        ({"eval_split": "0.1"}, "eval_split must be a share .*; got '0.1'"),
        ({"eval_split": 1.0}, "eval_split must be a share .*; got 1.0"),
        ({"eval_split": 5.0}, "eval_split must be a share .*; got 5.0"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve({**BASE, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_4bit": True, "lora_r": 4}, "use_4bit needs bitsandbytes, which is not installed"),
        ({"provider": "unsloth"}, "provider 'unsloth' needs unsloth, which is not installed"),
    ],
)
def test_a_missing_library_is_an_error_and_nothing_is_written(
    change: dict[str, Any],
    message: str,
    tiny: dict[str, Any],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fusedpo.tools.train import train

    monkeypatch.setattr(
        requirements,
        "find_spec",
        lambda name: None if name in ("bitsandbytes", "unsloth") else types,
    )
    output = tmp_path / "out"
    with pytest.raises(ImportError, match=message):
        train({**tiny, "strategy": "dpo", **change}, output_dir=str(output))
    assert not output.exists()


def test_unsloth_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(requirements, "find_spec", lambda name: types)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="provider 'unsloth' needs a GPU"):
        resolve({**BASE, "provider": "unsloth"})


def test_four_bits_without_an_accelerator_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_bitsandbytes(monkeypatch)
    monkeypatch.setattr(requirements, "has_accelerator", lambda: False)
    with pytest.raises(RuntimeError, match="use_4bit needs an accelerator, and torch sees none"):
        resolve({**BASE, "use_4bit": True, "lora_r": 4})


def test_four_bits_on_a_device_that_cannot_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations

    def refuse(**_: Any) -> None:
        raise RuntimeError("no supported device")

    with_bitsandbytes(monkeypatch)
    monkeypatch.setattr(transformers.integrations, "validate_bnb_backend_availability", refuse)
    with pytest.raises(RuntimeError, match="bitsandbytes cannot run here: no supported device"):
        resolve({**BASE, "use_4bit": True, "lora_r": 4})


def test_unsloth_is_asked_for_the_model_and_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedpo.tools.train.models import load_unsloth

    asked: dict[str, Any] = {}

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(**keywords: Any) -> tuple[str, str]:
            asked.update(keywords)
            return "model", "tokenizer"

        @staticmethod
        def get_peft_model(model: str, **keywords: Any) -> str:
            asked.update(keywords)
            return f"{model} with adapter"

    module = types.ModuleType("unsloth")
    module.FastLanguageModel = FastLanguageModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", module)
    run = resolve({**BASE, "lora_r": 4, "lora_alpha": 8, "max_seq_length": 99})
    assert load_unsloth("m", run) == ("model with adapter", "tokenizer")
    assert (asked["model_name"], asked["max_seq_length"], asked["load_in_4bit"]) == ("m", 99, False)
    assert (asked["r"], asked["lora_alpha"], asked["random_state"]) == (4, 8, run.args.seed)

    assert load_unsloth("m", resolve({**BASE, "lora_target_modules": "all-linear"}))
    assert asked["target_modules"] == "all-linear"
    load_unsloth("m", resolve({**BASE, "lora_target_modules": ["v_proj", "q_proj"]}))
    assert asked["target_modules"] == ["q_proj", "v_proj"]
    load_unsloth("m", resolve({**BASE, "trust_remote_code": True, "model_revision": "v1"}))
    assert (asked["trust_remote_code"], asked["revision"]) == (True, "v1")


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("q_proj", {"q_proj"}),
        (["q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ("all-linear", "all-linear"),
        (r".*\.q_proj", r".*\.q_proj"),
    ],
)
def test_the_name_of_one_module_is_no_pattern(given: Any, want: Any) -> None:
    assert resolve({**BASE, "lora_target_modules": given}).peft.target_modules == want


def test_files_of_both_kinds_are_read_alike(tmp_path: pathlib.Path) -> None:
    config = {**BASE, "learning_rate": 5e-5, "lora_r": 8, "bf16": True, "loss_type": ["ipo"]}
    (tmp_path / "c.json").write_text(json.dumps(config), encoding="utf-8")
    lines = [f"{key}: {value}" for key, value in config.items() if key != "bf16"]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "bf16: true"]), encoding="utf-8")
    assert "5e-05" in (tmp_path / "c.yaml").read_text(encoding="utf-8")  # a string in YAML 1.1
    assert read_config(tmp_path / "c.json") == read_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.toml", "", "must be a .json, .yaml or .yml file"),
        ("c.json", "{", "this is no valid JSON"),
        ("c.yaml", "a: [", "this is no valid YAML"),
        ("c.yaml", "- dpo", "must be a mapping of options to values; got list"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    name: str, text: str, message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / name)


def test_what_is_resolved_can_be_written_as_json() -> None:
    told = json.loads(json.dumps(resolve({**BASE, "lora_r": 4, "warmup_ratio": 0.1}).as_dict()))
    assert told["arguments"]["warmup_steps"] == 0.1
    assert told["peft"]["r"] == 4
    assert any("warmup_ratio" in note for note in told["notes"])
    assert set(ALIASES) == {
        *("model_name", "dataset", "max_seq_length", "use_4bit", "dataset_test_split")
    }
