"""What is refused of a configuration because options contradict each other, or would be ignored."""

from __future__ import annotations

import warnings
from typing import Any

from fusedpo import loss_types
from fusedpo.tools.train.options import Options
from fusedpo.tools.train.strategies import Strategy


def check_options(options: Options) -> None:
    """Check what the configuration gives, before TRL's defaults are added.

    Raises:
        ValueError: the message names the option.
    """
    if options.strategy.trainer == "cpo":
        _check_cpo(options)
    if options.strategy.trainer == "dpo":
        _check_store(options)
    if not options.model.get("load_in_4bit"):
        names = ("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant")
        for name in names:
            if options.model.get(name):
                raise ValueError(f"{name} is an option of use_4bit, which is off; leave it out.")


def check_arguments(strategy: Strategy, args: Any) -> None:
    """Check the config class's arguments, as the trainer will get them.

    Raises:
        ValueError: the message names the option.
    """
    if args.max_length is not None and args.max_length < 1:
        raise ValueError(f"max_seq_length must be at least 1; got {args.max_length}.")
    if strategy.trainer in ("cpo", "orpo", "kto") and not args.beta > 0:
        raise ValueError(f"beta must be above 0; got {args.beta}.")
    if strategy.trainer == "dpo":
        _check_dpo(args)


def _check_store(options: Options) -> None:
    store, given = options.settings.ref_store, options.args.get("precompute_ref_log_probs")
    if store is False and given is True:
        raise ValueError(
            "ref_store is false, and precompute_ref_log_probs is true, which needs a store; leave "
            "one of them out."
        )
    if store not in (None, False) and given is False:
        raise ValueError(
            f"ref_store is {store!r}, and precompute_ref_log_probs is false: the store would serve "
            "for nothing; leave one of them out."
        )


def _check_cpo(options: Options) -> None:
    """Refuse options of CPO that the chosen loss would ignore."""
    from fusedpo.trl.cpo_orpo import cpo_loss

    given = options.args
    loss_type, alpha = given.get("loss_type", "sigmoid"), given.get("alpha", 0.0)
    known = ("sigmoid", "hinge", "ipo", "simpo")
    if loss_type not in known:
        raise ValueError(f"loss_type of CPO must be one of {', '.join(known)}; got {loss_type!r}.")
    if alpha and loss_type != "simpo":
        raise ValueError(f"alpha must be 0 with loss_type {loss_type!r}; AlphaPO is 'simpo'.")
    name = cpo_loss(loss_type, alpha)
    for key in ("label_smoothing", "simpo_gamma", "cpo_alpha"):
        if given.get(key) and key not in loss_types()[name].options:
            raise ValueError(f"{key} is no option of the loss {name!r}; leave it out.")


def _check_dpo(args: Any) -> None:
    """What FusedDPOTrainer would refuse, before data and model are read."""
    from fusedpo.trl.loss_options import loss_call
    from fusedpo.trl.refusals import refuse_options

    refuse_options(args)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fusedpo: DPOConfig has", UserWarning)
        try:
            loss_call(args)
        except UserWarning as warning:  # of ignored options
            raise ValueError(f"{warning} Leave out what is ignored.") from None
