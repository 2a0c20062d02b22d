"""The loss options of DPOConfig: checked when the trainer is built, and the loss of a batch.

What would be wrong in every step is refused at once, by name. What TRL documents as ignored for the
chosen losses is not passed on; one warning names it.
"""

from __future__ import annotations

import types
import warnings
from typing import Any

import torch
from torch import Tensor

from fusedpo import PairLogps, PreferenceLoss, loss_types, preference_loss, reference
from fusedpo.reference.logps import exact

_DEFAULTS = {"label_smoothing": 0.0, "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.05}


def loss_attributes(trainer: Any) -> types.SimpleNamespace:
    """Return what a trainer's loss depends on, by the names of DPOConfig. TRL reads its attributes
    in every step, so a callback may change them."""
    return types.SimpleNamespace(
        loss_type=list(trainer.loss_types),
        loss_weights=list(trainer.loss_weights),
        beta=trainer.beta,
        label_smoothing=trainer.label_smoothing,
        f_divergence_type=trainer.f_divergence_type,
        f_alpha_divergence_coef=trainer.f_alpha_divergence_coef,
        discopop_tau=trainer.args.discopop_tau,
        ld_alpha=trainer.ld_alpha,
        use_weighting=trainer.use_weighting,
    )


def loss_call(config: Any) -> dict[str, Any]:
    """Return the keyword options of `preference_loss` that a DPOConfig stands for, or what
    `loss_attributes` returns.

    Raises:
        ValueError: an unknown loss, or an option out of range; the message names it.
    """
    types = loss_types()
    names = list(config.loss_type)
    for name in names:
        if name not in types or "ref_chosen_logps" not in types[name].needs:
            known = [each for each in types if "ref_chosen_logps" in types[each].needs]
            raise ValueError(
                f"DPOConfig.loss_type must be among {', '.join(known)}; got {name!r}. "
                "fusedpo.preference_loss has losses without a reference model."
            )
    if config.ld_alpha is not None and not 0 <= config.ld_alpha <= 1:
        raise ValueError(f"DPOConfig.ld_alpha must be in [0, 1]; got {config.ld_alpha}.")
    call = {
        "loss_type": names,
        "loss_weights": None if config.loss_weights is None else list(config.loss_weights),
        "beta": config.beta,
        "f_divergence_type": config.f_divergence_type,
    }
    ignored = []
    for option, default in _DEFAULTS.items():
        used = any(option in types[name].options for name in names)
        if option == "f_alpha_divergence_coef":
            used = config.f_divergence_type == "alpha_divergence"
        value = getattr(config, option)
        if used:
            call[option] = value
        elif value != default:
            ignored.append(f"{option}={value}")
    _check(call)
    if config.use_weighting and any(name in ("aot", "aot_unpaired") for name in names):
        raise ValueError(
            "DPOConfig.use_weighting must be False with loss_type 'aot' and 'aot_unpaired': they "
            "sort the batch, so that no term belongs to one pair."
        )
    if ignored:
        warnings.warn(
            f"fusedpo: DPOConfig has {', '.join(ignored)}, which loss_type {names} with "
            f"f_divergence_type {config.f_divergence_type!r} ignores, in TRL, too.",
            stacklevel=4,
        )
    return call


def _check(call: dict[str, Any]) -> None:
    nothing, ones = torch.zeros(0), torch.ones(0, dtype=torch.int64)
    try:
        reference.preference_loss(
            *(nothing,) * 4,
            chosen_lengths=ones,
            rejected_lengths=ones,
            chosen_nll=torch.zeros(()),
            **call,
        )
    except (TypeError, ValueError) as e:
        raise type(e)(f"DPOConfig: {e}") from None


def batch_loss(
    call: dict[str, Any],
    policy: PairLogps,
    ref_logps: tuple[Tensor, Tensor],
    token_logps: Tensor,
    log_sum_sq_probs: Tensor | None,
    completion_mask: Tensor,
) -> PreferenceLoss:
    """The loss of a batch of pairs as TRL defines it.

    Args:
        call: from `loss_call`.
        policy, ref_logps: log-probs [B] of chosen and rejected completions, nats.
        token_logps: [2B, T], of the policy, 0 outside completions.
        log_sum_sq_probs: [2B, T] when the pairs are weighted (WPO), else None.
        completion_mask: [2B, T + 1], not shifted.
    """
    # TRL divides by the counts of the unshifted mask: another number for an empty prompt.
    chosen_lengths, rejected_lengths = completion_mask.sum(dim=1).clamp(min=1).chunk(2)
    mask = completion_mask[:, 1:] != 0
    # Precomputed references come back in float32; a reference model may have a dtype of its own.
    ref_logps = (ref_logps[0].to(policy.chosen.dtype), ref_logps[1].to(policy.chosen.dtype))
    return preference_loss(
        policy.chosen,
        policy.rejected,
        *ref_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        chosen_nll=_mean_nll(token_logps, mask) if "sft" in call["loss_type"] else None,
        pair_weights=None
        if log_sum_sq_probs is None
        else _wpo_weights(token_logps.detach() - log_sum_sq_probs, mask),
        **call,
    )


def _mean_nll(token_logps: Tensor, mask: Tensor) -> Tensor:
    """Token mean of -logp over the chosen completions of the batch, 0-d; 0 without any token."""
    pairs = mask.shape[0] // 2
    total = exact(token_logps[:pairs].masked_fill(~mask[:pairs], 0)).sum()
    return (-total / mask[:pairs].sum().clamp(min=1)).to(token_logps.dtype)


def _wpo_weights(aligned: Tensor, mask: Tensor) -> Tensor:
    """exp of the token mean of logp_t - log sum_v p_v^2, chosen times rejected, [B]; constants."""
    means = exact(aligned.masked_fill(~mask, 0)).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    chosen, rejected = means.chunk(2)
    return (chosen + rejected).exp().to(aligned.dtype)
