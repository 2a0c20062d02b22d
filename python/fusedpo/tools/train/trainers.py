"""The trainer of a run: TRL's, or fusedpo's in front of TRL's."""

from __future__ import annotations

import contextlib
from typing import Any

from fusedpo.tools.train.data import Data
from fusedpo.tools.train.models import load, load_unsloth, source_options
from fusedpo.tools.train.resolving import Resolved


def fused_head(run: Resolved) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a trainer is built and runs: `patch_trl` puts fusedpo's head
    under TRL's own trainers; FusedDPOTrainer brings its own."""
    from fusedpo.trl import patch_trl

    if run.strategy.trainer == "dpo":
        return contextlib.nullcontext()
    return patch_trl()


def build(trainer: type, run: Resolved, data: Data, model: str) -> Any:
    """Return the trainer, ready to train.

    Args:
        trainer: from `trainer_class`.
        run, data: from `resolve` and `load_data`.
        model: a name or folder of a whole model.
    """
    import transformers

    kind = run.strategy.trainer
    # Adapters are made before the trainers set the seed.
    transformers.set_seed(run.args.seed)
    keywords: dict[str, Any] = {
        "args": run.args,
        "train_dataset": data.train,
        "eval_dataset": data.evaluation,
    }
    start: Any = model
    if run.settings.provider == "unsloth":
        start, keywords["processing_class"] = load_unsloth(model, run)
    else:
        keywords["peft_config"] = run.peft
        if kind in ("cpo", "orpo"):  # experimental: they take neither of the two for a name
            start = load(model, run)
            keywords["processing_class"] = _tokenizer(model, run)
        else:
            keywords["quantization_config"] = run.quantization
    if kind == "dpo":
        keywords |= _reference(run)
    return trainer(start, **keywords)


def trainer_class(kind: str) -> Any:
    """Return the trainer that a key of TRAINERS stands for."""
    import trl

    from fusedpo.trl import FusedDPOTrainer

    if kind in ("cpo", "orpo"):
        from fusedpo.trl import cpo_orpo

        return cpo_orpo.FusedCPOTrainer if kind == "cpo" else cpo_orpo.FusedORPOTrainer
    return {"dpo": FusedDPOTrainer, "sft": trl.SFTTrainer, "kto": trl.KTOTrainer}[kind]


def _reference(run: Resolved) -> dict[str, Any]:
    settings = run.settings
    keywords: dict[str, Any] = {"share_prompts": settings.share_prompts}
    if isinstance(settings.ref_store, str):
        keywords["ref_store"] = settings.ref_store
    if run.uses_store:
        keywords |= {"ref_miss": settings.ref_miss, "ref_identity": settings.ref_identity}
    return keywords


def _tokenizer(model: str, run: Resolved) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, **source_options(run))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
