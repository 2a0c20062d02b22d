"""What FusedDPOTrainer counts on in TRL, checked before it is used.

On the versions that versions.py names all of this holds. A newer TRL may have changed it: then an
error names the difference here, before a training meets it in its middle or, worse, does not.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from fusedpo._head_adapter import READS_ADAPTERS
from fusedpo.trl.versions import UnsupportedTRLError, at_least

__all__ = ["check_attributes", "check_bindings"]

_TRAINER = "trl.trainer.dpo_trainer.DPOTrainer"
# Parameters, in order, of what is overridden, called or replaced. One more may change the result.
_SIGNATURES = {
    f"{_TRAINER}.__init__": (
        "self",
        "model",
        "ref_model",
        "args",
        "data_collator",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "compute_metrics",
        "callbacks",
        "optimizers",
        "quantization_config",
        "peft_config",
    ),
    f"{_TRAINER}._prepare_dataset": (
        "self",
        "dataset",
        "processing_class",
        "args",
        "dataset_name",
    ),
    f"{_TRAINER}._precompute_ref_logps": ("self", "dataset", "name", "batch_size"),
    f"{_TRAINER}.compute_ref_log_probs": ("self", "model", "inputs"),
    f"{_TRAINER}.compute_loss": (
        "self",
        "model",
        "inputs",
        "return_outputs",
        "num_items_in_batch",
    ),
    f"{_TRAINER}._compute_loss": ("self", "model", "inputs", "return_outputs"),
    "trl.trainer.utils.create_model_from_path": ("model_id", "architecture", "kwargs"),
    "trl.trainer.utils.disable_dropout_in_model": ("model",),
    "trl.trainer.utils.get_config_model_id": ("config",),
    "trl.trainer.utils.hash_module": ("module",),
    "trl.trainer.utils.maybe_gather_lm_head_ctx": ("params",),
    "trl.trainer.utils.use_adapter": ("model", "adapter_name"),
    "trl.models.utils.disable_gradient_checkpointing": ("model", "gradient_checkpointing_kwargs"),
}
# What DPOTrainer sets when it is built, and FusedDPOTrainer reads.
_ATTRIBUTES = (
    "_metrics",
    "_tokenizer",
    "_total_train_tokens",
    "aux_loss_enabled",
    "beta",
    "f_alpha_divergence_coef",
    "f_divergence_type",
    "label_smoothing",
    "ld_alpha",
    "loss_types",
    "loss_weights",
    "precompute_ref_logps",
    "ref_model",
    "router_aux_loss_coef",
    "use_weighting",
)


def replaced_names() -> tuple[str, ...]:
    """The globals of `DPOTrainer.__init__` that construct.py replaces."""
    names = ["create_model_from_path"]
    if at_least(1, 14):  # before, `_precompute_ref_logps` looks it up, which is overridden
        names.append("hash_module")
    if at_least(1, 15):
        names.append("add_fused_lm_head")
        if READS_ADAPTERS:  # with an older PEFT, TRL's refusal of adapters on the head stays
            names.append("BaseTunerLayer")
    return tuple(names)


def check_bindings(version: str) -> None:
    """Compare TRL with what FusedDPOTrainer binds to.

    Raises:
        UnsupportedTRLError: something is missing or takes other arguments; all of it is named.
    """
    differing = []
    for name, wanted in _SIGNATURES.items():
        found = _parameters(name)
        if found is None:
            differing.append(f"{name} is missing")
        elif found != wanted:
            takes = ", ".join(found)
            differing.append(f"{name} must take ({', '.join(wanted)}), and takes ({takes})")
    if not differing:
        init = importlib.import_module("trl.trainer.dpo_trainer").DPOTrainer.__init__
        looked_up = inspect.unwrap(init).__code__.co_names
        differing = [
            f"{_TRAINER}.__init__ must call {name}, and does not"
            for name in replaced_names()
            if name not in looked_up
        ]
    if differing:
        raise UnsupportedTRLError(_message(version, differing))


def check_attributes(trainer: Any, version: str) -> None:
    """Check what `DPOTrainer.__init__` has set.

    Raises:
        UnsupportedTRLError: attributes are missing; all of them are named.
    """
    missing = [name for name in _ATTRIBUTES if name not in vars(trainer)]
    if missing:
        raise UnsupportedTRLError(
            _message(version, [f"DPOTrainer has no attribute {name}" for name in missing])
        )


def _message(version: str, differing: list[str]) -> str:
    return (
        f"FusedDPOTrainer cannot work with TRL {version}: {'; '.join(differing)}. "
        "Use a TRL release as published, or a fusedpo that knows this one."
    )


def _parameters(name: str) -> tuple[str, ...] | None:
    """The parameters of a function or method by its full name; None where there is none."""
    *module, owner, last = name.split(".")
    path = [owner, last]
    if not owner[0].isupper():  # a function of a module
        module, path = [*module, owner], [last]
    try:
        found: Any = importlib.import_module(".".join(module))
    except ModuleNotFoundError:
        return None
    for part in path:
        found = inspect.getattr_static(found, part, None)
    return None if found is None else tuple(inspect.signature(found).parameters)
