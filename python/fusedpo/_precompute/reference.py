"""The model that scores: loaded as DPOTrainer would load it, with the fused head for a while."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from fusedpo._head import add_fused_head
from fusedpo._head_adapter import read_head

DTYPES = ("float32", "bfloat16", "float16", "auto")


def process_state() -> Any:
    """Return accelerate's state: rank, number of processes, device.

    Raises:
        RuntimeError: a launcher started several processes, and accelerate sees one.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != launched:
        # Each would take all of the work for its own.
        raise RuntimeError(
            f"the launcher started {launched} processes, but accelerate was set up for "
            f"{state.num_processes} before. Make no PartialState() or Accelerator() of another "
            "kind before precompute."
        )
    return state


def load_reference(
    model: str,
    *,
    dtype: str,
    revision: str | None,
    attn_implementation: str | None,
    ref_adapter: str | None,
) -> Any:
    """Load a reference model as TRL's trainers load theirs, on this process's device.

    Raises:
        ValueError: `model` is an adapter without its base model, or `dtype` is unknown.
    """
    from trl.trainer.utils import create_model_from_path

    folder = pathlib.Path(model)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"{model} is an adapter, not a model. Use --model BASE --ref-adapter {model}."
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    options: dict[str, Any] = {"dtype": dtype}
    if revision is not None:
        options["revision"] = revision
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    state = process_state()
    if state.num_processes > 1:
        options["device_map"] = None  # each process holds the whole model on its own device
    loaded = create_model_from_path(model, **options)
    if ref_adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, ref_adapter)
    if not getattr(base_model(loaded), "hf_device_map", None):
        loaded = loaded.to(state.device)
    return loaded


def load_processing_class(model: Any, revision: str | None) -> Any:
    """Return the tokenizer (or the processor) that belongs to a model, as DPOTrainer does."""
    from transformers import AutoProcessor

    path = isinstance(model, (str, os.PathLike))
    name = os.fspath(model) if path else getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError(
            "the model does not tell where its tokenizer is. Pass processing_class=tokenizer."
        )
    return AutoProcessor.from_pretrained(name, revision=revision)


def base_model(model: Any) -> Any:
    """The transformers model within a PeftModel; any other model as it is."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def check_head(model: Any) -> None:
    """Raise ValueError, by name, where the fused head cannot stand in for the model's own."""
    read_head(base_model(model).get_output_embeddings())


@contextlib.contextmanager
def fused_head(model: Any) -> Iterator[None]:
    """Give the model the fused head, and take it away again."""
    base = base_model(model)
    before = vars(base).get("forward")
    add_fused_head(base)
    try:
        yield
    finally:
        if before is None:
            del base.forward
        else:
            base.forward = before


def pad_token_id(processing_class: Any) -> int:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    # Padding comes after every scored token, so its value decides nothing.
    return int(tokenizer.pad_token_id or 0)
