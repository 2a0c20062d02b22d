"""The loss functions in plain PyTorch; paired.py has the paired losses, `UNPAIRED` the others.

The arithmetic per pair runs in float64 and is rounded once. An entry in `UNPAIRED` and a case in
csrc/core/loss_unpaired.h make a new unpaired loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._loss_checks import Unpaired, check_pair_tensors, check_unpaired, planner
from .logps import exact, warn_empty_completions
from .paired import PAIRED, Pairs, nls

__all__ = [
    "UNPAIRED",
    "PreferenceLoss",
    "UnpairedLoss",
    "pair_plan",
    "preference_loss",
    "unpaired_loss",
]

pair_plan = planner(PAIRED)


class PreferenceLoss(NamedTuple):
    """`loss` (0-d, or [B] for reduction "none") and `losses` [B] have gradients, the rest not."""

    loss: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracies: Tensor


class UnpairedLoss(NamedTuple):
    """`loss` (0-d, or [B] for reduction "none") and `losses` [B] have gradients, `rewards` not."""

    loss: Tensor
    losses: Tensor
    rewards: Tensor


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    cpo_alpha: float | None = None,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_nll: Tensor | None = None,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceLoss:
    """sum_k w_k loss_k over pairs of log-probabilities [B] in nats; `PAIRED` has the losses."""
    plan = pair_plan(
        loss_type,
        loss_weights,
        beta,
        label_smoothing,
        f_divergence_type,
        f_alpha_divergence_coef,
        discopop_tau,
        cpo_alpha,
        simpo_gamma,
        alpha,
    )
    check_pair_tensors(
        plan,
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_lengths,
        rejected_lengths,
        chosen_nll,
        pair_weights,
        reduction,
    )
    refs = lengths = None
    if plan.needs_reference and ref_chosen_logps is not None and ref_rejected_logps is not None:
        refs = ref_chosen_logps, ref_rejected_logps
    if plan.needs_lengths and chosen_lengths is not None and rejected_lengths is not None:
        lengths = chosen_lengths, rejected_lengths
        warn_empty_completions(*lengths)
    pairs = Pairs(plan, (chosen_logps, rejected_logps), refs, lengths)

    losses = torch.zeros_like(pairs.chosen)
    for loss, weight, nll_weight in zip(plan.losses, plan.weights, plan.nll_weights, strict=True):
        value = loss.value(pairs)
        if nll_weight != 0 and chosen_nll is not None:
            value = value + nll_weight * exact(chosen_nll)
        losses = losses + weight * value
    if pair_weights is not None:
        losses = losses * exact(pair_weights.detach())

    dtype = chosen_logps.dtype
    chosen_rewards, rejected_rewards = (reward.detach() for reward in _rewards(pairs))
    return PreferenceLoss(
        loss=_reduce(losses, reduction).to(dtype),
        losses=losses.to(dtype),
        chosen_rewards=chosen_rewards.to(dtype),
        rejected_rewards=rejected_rewards.to(dtype),
        margins=(chosen_rewards - rejected_rewards).to(dtype),
        accuracies=(chosen_rewards > rejected_rewards).to(dtype),
    )


def _rewards(p: Pairs) -> tuple[Tensor, Tensor]:
    """beta r, or what the trainer of the first loss reports where no loss has a reference."""
    if p.plan.needs_reference:
        chosen, rejected = p.r_chosen, p.r_rejected
    elif p.plan.names[0] == "alphapo":
        chosen, rejected = p.alpha_rewards()
    elif p.plan.names[0] in ("cpo_ipo", "simpo", "orpo"):
        chosen, rejected = p.mean_logps()
    else:
        chosen, rejected = p.chosen, p.rejected
    return p.beta * chosen, p.beta * rejected


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    # The mean of no pair is 0, not NaN: an empty batch must not spoil an accumulated loss.
    return losses.sum() / (max(losses.shape[0], 1) if reduction == "mean" else 1)


# ---- unpaired -----------------------------------------------------------------------------------


class _Completions(NamedTuple):
    """Float64 tensors [B], `sign` 1 where desirable and -1 where not; kl and delta as given."""

    r: Tensor
    sign: Tensor
    beta: float
    kl: Any
    delta: Any


def _kto(c: _Completions) -> Tensor:
    kl = c.kl.clamp(min=0) if isinstance(c.kl, Tensor) else max(c.kl, 0.0)
    return torch.sigmoid(-c.sign * c.beta * (c.r - kl))


def _apo_zero_unpaired(c: _Completions) -> Tensor:
    return torch.sigmoid(-c.sign * c.beta * c.r)


def _bco(c: _Completions) -> Tensor:
    return nls(c.sign * (c.beta * c.r - c.delta))


UNPAIRED: dict[str, Unpaired] = {
    "kto": Unpaired(
        0,
        "1 - sigmoid(beta (r - kl)) if desirable, else 1 - sigmoid(beta (kl - r)); kl >= 0",
        "KTO, arXiv 2402.01306",
        "completions are marked good or bad, not compared",
        _kto,
        uses_kl=True,
    ),
    "apo_zero_unpaired": Unpaired(
        1,
        "1 - sigmoid(beta r) if desirable, else sigmoid(beta r)",
        "APO, arXiv 2408.06266",
        "as kto without its estimate of the KL divergence",
        _apo_zero_unpaired,
    ),
    "bco": Unpaired(
        2,
        "-ls(beta r - delta) if desirable, else -ls(-(beta r - delta))",
        "BCO, arXiv 2404.04656",
        "a classifier of good and bad; delta is the running mean of the rewards",
        _bco,
        uses_delta=True,
    ),
}


def unpaired_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    kl: float | Tensor | None = None,
    delta: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> UnpairedLoss:
    """One loss over log-probabilities [B] in nats of marked completions; `UNPAIRED` has them."""
    loss = check_unpaired(
        UNPAIRED,
        logps,
        ref_logps,
        labels,
        loss_type,
        beta,
        kl,
        delta,
        desirable_weight,
        undesirable_weight,
        reduction,
    )
    r = exact(logps) - exact(ref_logps)
    sign = torch.full_like(r, -1.0).masked_fill(labels, 1.0)
    shifts = (
        exact(value.detach().reshape(())) if isinstance(value, Tensor) else value
        for value in (kl, delta)
    )
    weights = torch.full_like(r, undesirable_weight).masked_fill(labels, desirable_weight)
    losses = weights * loss.value(_Completions(r, sign, beta, *shifts))
    return UnpairedLoss(
        loss=_reduce(losses, reduction).to(logps.dtype),
        losses=losses.to(logps.dtype),
        rewards=(beta * r).detach().to(logps.dtype),
    )
