"""Models that generate: loaded from a folder, a hub name or an adapter, and put into the state in
which they generate, for a while."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    model: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
) -> tuple[Any, Any]:
    """Return (model, tokenizer), ready to generate, on the accelerator if there is one.

    Args:
        model: a folder or a name on the Hugging Face Hub: of a model, or of a PEFT adapter, which
            brings its base model along.
        adapter: a PEFT adapter to put on the model.
        dtype: one of DTYPES; "auto" is as saved.

    Raises:
        ValueError: dtype is unknown, or `model` with `adapter` is an adapter itself.
        ImportError: there is no transformers, or an adapter and no PEFT.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError('generating needs transformers; pip install "fusedpo[tools]"') from error
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    name, folders = os.fspath(model), [os.fspath(model)]
    base = _base_of_adapter(name)
    if base is not None:
        if adapter is not None:
            raise ValueError(f"model must not be an adapter with adapter={adapter}; got {name}.")
        adapter, name = name, base
    loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if adapter is not None:
        folders = [os.fspath(adapter), name]  # a training saves its tokenizer with the adapter
        loaded = _peft().PeftModel.from_pretrained(loaded, folders[0])
    if torch.accelerator.is_available():
        loaded = loaded.to(torch.accelerator.current_accelerator())
    return loaded.eval(), _tokenizer(folders)


def tokenizer_of(model: Any) -> Any:
    """Return the tokenizer of a model object, from where the model was loaded.

    Raises:
        ValueError: the model was not loaded from anywhere.
    """
    name = getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError(
            "the model does not tell where its tokenizer is. Pass tokenizer=tokenizer."
        )
    return _tokenizer([name])


@contextlib.contextmanager
def ready_to_generate(model: Any, tokenizer: Any) -> Iterator[None]:
    """Put the model into evaluation mode, with a generation_config that ends texts and nothing
    else; afterwards mode and config are what they were."""
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    own = base.generation_config
    ends = {tokenizer.eos_token_id}
    ends.update(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id])
    ends.discard(None)
    pad = tokenizer.pad_token_id
    plain = GenerationConfig(
        do_sample=False,
        use_cache=True,  # a training with gradient checkpointing turns it off in the config
        eos_token_id=sorted(ends) or None,
        # Left of every token that is attended to, or after the end: its value decides nothing.
        pad_token_id=pad if pad is not None else min(ends, default=0),
        bos_token_id=tokenizer.bos_token_id,
    )
    holders = {id(each): each for each in (model, base) if "generation_config" in vars(each)}
    before = {key: holder.generation_config for key, holder in holders.items()}
    training = [module for module in model.modules() if module.training]
    model.eval()
    for holder in holders.values():
        holder.generation_config = plain
    try:
        with torch.no_grad():
            yield
    finally:
        for key, holder in holders.items():
            holder.generation_config = before[key]
        for module in training:
            module.training = True


def _base_of_adapter(name: str) -> str | None:
    """The base model of a folder with an adapter and no model; None for anything else."""
    folder = pathlib.Path(name)
    config = folder / "adapter_config.json"
    if not config.exists() or (folder / "config.json").exists():
        return None
    base: str = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return base


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError('an adapter needs PEFT; pip install "fusedpo[tools]"') from error
    return peft


def _tokenizer(folders: list[str]) -> Any:
    from transformers import AutoTokenizer

    with_files = [f for f in folders if (pathlib.Path(f) / "tokenizer_config.json").exists()]
    return AutoTokenizer.from_pretrained((with_files or folders[-1:])[0])
