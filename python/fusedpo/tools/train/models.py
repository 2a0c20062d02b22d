"""The model that a training starts from, and the one it is compared with afterwards."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from fusedpo.tools.train.resolving import Resolved


def base_of(model: str) -> str | None:
    """Return the base model of a folder that has a PEFT adapter; None for a whole model."""
    file = pathlib.Path(model, "adapter_config.json")
    if not file.is_file():
        return None
    return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])


def source_options(run: Resolved) -> dict[str, Any]:
    """Return what everything that is read of a model must be told: which revision, and whether its
    own code may run."""
    names = ("revision", "trust_remote_code")
    return {name: run.model_options[name] for name in names if name in run.model_options}


def whole_model(run: Resolved) -> str:
    """Return the name of the model to train; an adapter is merged into its base first, and put into
    `output_dir/start`, so that what is trained on top of it names a base that exists."""
    if base_of(run.model) is None:
        return run.model
    from accelerate import PartialState
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    folder = pathlib.Path(run.output_dir, "start")
    state = PartialState()
    with state.main_process_first():  # the others wait until it is there
        if state.is_main_process:
            dtype = run.model_options.get("dtype", "float32")
            trust = run.model_options.get("trust_remote_code", False)
            adapted = AutoPeftModelForCausalLM.from_pretrained(
                run.model, dtype=dtype, trust_remote_code=trust
            )
            adapted.merge_and_unload().save_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(run.model, trust_remote_code=trust)
            tokenizer.save_pretrained(folder)
    return str(folder)


def load(name: str, run: Resolved) -> Any:
    """Return a model as the trainer would load it."""
    from transformers import AutoModelForCausalLM

    options = dict(run.model_options)
    if run.quantization is not None:
        options["quantization_config"] = run.quantization
    return AutoModelForCausalLM.from_pretrained(name, **options)


def load_unsloth(name: str, run: Resolved) -> tuple[Any, Any]:
    """Return a model and its tokenizer from unsloth, with the adapter on it."""
    from unsloth import FastLanguageModel

    four_bit = run.quantization is not None and bool(run.quantization.load_in_4bit)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=name,
        max_seq_length=run.args.max_length,
        dtype=None,
        load_in_4bit=four_bit,
        **source_options(run),
    )
    if run.peft is not None:
        targets = run.peft.target_modules
        if isinstance(targets, set):
            targets = sorted(targets)
        model = FastLanguageModel.get_peft_model(
            model,
            r=run.peft.r,
            lora_alpha=run.peft.lora_alpha,
            lora_dropout=run.peft.lora_dropout,
            random_state=run.args.seed,
            **({} if targets is None else {"target_modules": targets}),
        )
    return model, tokenizer
