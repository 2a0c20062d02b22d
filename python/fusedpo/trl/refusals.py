"""Arguments that FusedDPOTrainer does not know, and options of DPOConfig that it does not follow:
refused by name before anything loads.

Options of the loss are loss_options.py's; what TRL itself refuses is left to TRL.
docs/trl.md lists every option.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from fusedpo.trl.versions import at_least

# The options of TRL 1.9.2 to 1.16. One that a newer TRL adds might change the loss.
_KNOWN = frozenset(
    {
        "activation_offloading",
        "beta",
        "dataset_num_proc",
        "disable_dropout",
        "discopop_tau",
        "f_alpha_divergence_coef",
        "f_divergence_type",
        "label_smoothing",
        "ld_alpha",
        "loss_type",
        "loss_weights",
        "max_length",
        "model_init_kwargs",
        "pad_to_multiple_of",
        "pad_token",
        "padding_free",
        "precompute_ref_batch_size",
        "precompute_ref_log_probs",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "router_aux_loss_coef",
        "sync_ref_model",
        "truncation_mode",
        "trust_remote_code",
        "use_weighting",
    }
)


def refuse_arguments(names: Iterable[str], trainer_class: type) -> None:
    """Check the keyword arguments that a trainer would pass on to DPOTrainer.

    Raises:
        TypeError: DPOTrainer takes no such argument; the message tells where it may belong.
    """
    parameters = inspect.signature(trainer_class).parameters.values()
    own = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    takes = [*inspect.signature(DPOTrainer).parameters, *own]
    options = {each.name for each in dataclasses.fields(DPOConfig)}
    for name in names:
        if name in takes:
            continue
        remedy = f"It takes {', '.join(takes)}."
        close = difflib.get_close_matches(name, takes, n=1)
        if name in options:
            remedy = f"It is an option of the training: args=DPOConfig({name}=...)."
        elif close:
            remedy = f"Did you mean {close[0]}?"
        raise TypeError(f"FusedDPOTrainer has no argument {name!r}. {remedy}")


def refuse_options(config: Any) -> None:
    """Check a DPOConfig.

    Raises:
        TypeError: it is not one.
        ValueError: an option that cannot be followed; the message names it.
    """
    if not isinstance(config, DPOConfig):
        raise TypeError(f"args must be a trl.DPOConfig; got {type(config).__name__}.")
    inherited = {each.name for each in dataclasses.fields(TrainingArguments)}
    # TRL's fields; what a class of the user's adds is the user's.
    for each in dataclasses.fields(DPOConfig):
        if each.name in _KNOWN or each.name in inherited:
            continue
        value = getattr(config, each.name)
        if value != _default(each):
            raise ValueError(
                f"DPOConfig.{each.name}={value!r} is not known to this fusedpo, which cannot tell "
                "whether it would be followed. Leave it at its default, or upgrade fusedpo."
            )
    if config.padding_free:
        raise ValueError(
            "DPOConfig.padding_free must be False: no supported TRL follows it (it warns, and "
            "pads). Padding never reaches the head of FusedDPOTrainer."
        )
    if config.label_smoothing_factor:
        raise ValueError(
            "DPOConfig.label_smoothing_factor must be 0: it belongs to transformers' own loss, "
            "which no DPO loss uses. DPOConfig.label_smoothing is that of the preference losses."
        )
    if config.use_liger_kernel and not at_least(1, 15):
        raise ValueError(
            "DPOConfig.use_liger_kernel must be False below TRL 1.15, where it selects a loss of "
            "TRL's own, which would run instead of FusedDPOTrainer's. Leave it out: the fused head "
            "is in place without it."
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
