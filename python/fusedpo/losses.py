"""Losses over log-probabilities of whole completions: preference pairs, and marked completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, int64

from . import _load, reference
from ._check import refuse_transforms
from ._loss_checks import check_pair_tensors, check_unpaired
from .reference import PreferenceLoss, UnpairedLoss
from .reference.logps import warn_empty_completions
from .reference.losses import UNPAIRED, pair_plan
from .reference.paired import PAIRED

if TYPE_CHECKING or _load.native("cpu"):
    from .ops_loss import has_empty, run_pairs, run_unpaired

__all__ = ["LossType", "loss_types", "preference_loss", "unpaired_loss"]

_CLASS_WEIGHTS = ("desirable_weight", "undesirable_weight")
_REDUCTION_CODES = {"mean": 0, "sum": 1, "none": 1}


class LossType(NamedTuple):
    """What `loss_types()` tells of one loss."""

    formula: str
    needs: tuple[str, ...]
    options: tuple[str, ...]
    source: str
    use: str
    paired: bool


def loss_types() -> dict[str, LossType]:
    """Return every loss by name: formula, arguments it needs, options it has, source, when to use.

    Names with `paired` go to `preference_loss`, the others to `unpaired_loss`. Formulas: r = logp -
    ref_logp in nats, s the f-divergence score of r, ls = log sigmoid, eps = label_smoothing, |y| =
    completion tokens, c chosen, r rejected.

    Example:
        >>> loss_types()["ipo"].needs
        ('ref_chosen_logps', 'ref_rejected_logps', 'chosen_lengths', 'rejected_lengths')
    """
    types = {}
    for name, paired in PAIRED.items():
        needs: tuple[str, ...] = ()
        if paired.reference:
            needs += ("ref_chosen_logps", "ref_rejected_logps")
        if paired.lengths:
            needs += ("chosen_lengths", "rejected_lengths")
        if paired.nll_weight or paired.cpo_alpha_default:
            needs += ("chosen_nll",)
        types[name] = LossType(
            paired.formula, needs, paired.options, paired.source, paired.use, True
        )
    for name, loss in UNPAIRED.items():
        needs = ("ref_logps", "labels", *(("kl",) if loss.uses_kl else ()))
        options = (*(("delta",) if loss.uses_delta else ()), *_CLASS_WEIGHTS)
        types[name] = LossType(loss.formula, needs, options, loss.source, loss.use, False)
    return types


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
    """Loss of B preference pairs: sum_k w_k loss_k, for one loss of the family or a list of them.

    Every derivative is formed with the value, in float64 and rounded once; backward only scales.
    Values and gradients are finite for |beta * margin| up to 1e4. With r = logp - ref_logp (nats),
    s = r or its f-divergence score, x = beta (s_c - s_r), ls = log sigmoid, eps = label_smoothing,
    |y| = completion tokens (at least 1), L = logp_c - logp_r, m = logp/|y|:

        name           loss of a pair                                       pick it when
        sigmoid        -ls(x)                                               DPO: start here
        cdpo           -(1-eps) ls(x) - eps ls(-x)                          labels err by eps
        robust         (-(1-eps) ls(x) + eps ls(-x)) / (1-2 eps)            the same, unbiased
        hinge          max(0, 1 - x)                                        margins may be enough
        ipo            (s_c/|y_c| - s_r/|y_r| - 1/(2 beta))^2               DPO overfits (lengths)
        ipo_sum        (s_c - s_r - 1/(2 beta))^2                           IPO as printed
        sigmoid_norm   -ls(beta (s_c/|y_c| - s_r/|y_r|))                    length bias (lengths)
        exo_pair       q (log q - log(1-eps)) + p (log p - log eps),        reverse KL to labels;
                       q = sigmoid(x), p = 1 - q                            eps > 0, e.g. 1e-3
        nca_pair       -ls(beta r_c) - ls(-beta r_c)/2 - ls(-beta r_r)/2    logp_c shall not fall
        bco_pair       -ls(beta r_c) - ls(-beta r_r)                        a classifier's view
        sppo_hard      (r_c - 1/(2 beta))^2 + (r_r + 1/(2 beta))^2          self-play
        aot            cdpo on sort(L) - sort(L_ref)                        a distribution moves
        aot_unpaired   cdpo on sort(r_c) - sort(r_r)                        the same, without pairs
        apo_zero       1 - sigmoid(beta r_c) + sigmoid(beta r_r)            chosen beats the model
        apo_down       sigmoid(beta r_c) + 1 - sigmoid(beta (r_c - r_r))    the model beats chosen
        discopop       -(1-q) ls(x) + q e^-x, q = sigmoid(x/discopop_tau)   found by search
        sft            chosen_nll                                           a term of a list
        cpo            -(1-eps) ls(beta L) - eps ls(-beta L) + a            no reference
        cpo_hinge      max(0, 1 - beta L) + a                               the same with a hinge
        cpo_ipo        (m_c - m_r - 1/(2 beta))^2 + a                       the same as ipo
        simpo          cdpo on beta (m_c - m_r) - simpo_gamma, + a          the same by length
        alphapo        simpo on (1 - e^(-alpha m))/alpha in place of m      simpo, rewards shaped
        orpo           chosen_nll - beta ls(logit e^m_c - logit e^m_r)      one stage, base model
        orpo_logratio  chosen_nll - beta ls(L); this is not ORPO            to reproduce articles

    a = cpo_alpha * chosen_nll; cpo_alpha=None is 1 for cpo, cpo_hinge, cpo_ipo and 0 for simpo,
    alphapo. `loss_types()` gives sources, docs/losses.md the hazards. Losses from cpo on need no
    reference; with all others it is an error to leave it out (pass zeros to mean zeros).

    Args:
        chosen_logps, rejected_logps: `[B]` float32 or float64, log-probs of the completions, nats.
        ref_chosen_logps, ref_rejected_logps: `[B]`, the same under the reference model.
        loss_type: a name or a list of names.
        loss_weights: one for each name, 1.0 by default.
        beta: strength of the reference's pull, > 0; of ipo the paper's tau.
        label_smoothing: eps of cdpo, robust, exo_pair, aot, aot_unpaired, cpo, simpo, alphapo.
        f_divergence_type: "reverse_kl" (s = r), "forward_kl" (1 - e^-r), "js_divergence" (log 2 +
            ls(r)) or "alpha_divergence" ((e^((a-1) r) - 1)/(a-1)), arXiv 2309.16240, in the losses
            that are written with s or x. Exponents are capped at 80, of ipo and ipo_sum at 40, and
            at less for |a - 1| < 0.05, where the score grows with 1 / |a - 1|.
        f_alpha_divergence_coef: a of alpha_divergence.
        discopop_tau, cpo_alpha, simpo_gamma, alpha: as above.
        chosen_lengths, rejected_lengths: `[B]` integers, completion tokens.
        chosen_nll: `[B]` or 0-d, mean negative log-prob of the chosen tokens of the batch.
        pair_weights: `[B]`, factors on the losses (WPO, arXiv 2406.11827); taken as constants.
        reduction: "mean" or "sum" over pairs, "none" for `loss` = `losses`.

    Returns:
        PreferenceLoss: `loss`, `losses` [B], rewards, margins, accuracies [B]. Rewards are beta r;
        of a list without any reference-based loss those of the first loss's own trainer: beta logp
        (cpo, cpo_hinge, orpo_logratio), beta m (cpo_ipo, simpo, orpo), beta times the shaped reward
        (alphapo). A tie counts as not accurate. `loss` and `losses` are differentiable, once, in
        log-probs and chosen_nll. `losses` of aot and aot_unpaired come in sorted order. The mean of
        no pair is 0.

    Raises:
        ValueError: a need that is missing; an option off its default that no named loss uses; a
            value out of range; a wrong shape or name. TypeError: a wrong dtype or type.

    Example:
        >>> import torch
        >>> policy, ref = torch.tensor([-10.0]), torch.tensor([-11.0])
        >>> preference_loss(policy, policy, ref, ref + 2).loss  # r_c = 1, r_r = -1
        tensor(0.5981)
    """
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
    tensors = (
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_lengths,
        rejected_lengths,
        chosen_nll,
        pair_weights,
    )
    check_pair_tensors(plan, *tensors, reduction)
    device = chosen_logps.device.type
    if not _load.native(device):
        _load.warn_fallback(device)
        return reference.preference_loss(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            loss_type=loss_type,
            loss_weights=loss_weights,
            beta=beta,
            label_smoothing=label_smoothing,
            f_divergence_type=f_divergence_type,
            f_alpha_divergence_coef=f_alpha_divergence_coef,
            discopop_tau=discopop_tau,
            cpo_alpha=cpo_alpha,
            simpo_gamma=simpo_gamma,
            alpha=alpha,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            chosen_nll=chosen_nll,
            pair_weights=pair_weights,
            reduction=reduction,
        )
    refuse_transforms()
    # What no named loss needs does not reach the operator, and gets no gradient.
    if not plan.needs_reference:
        ref_chosen_logps = ref_rejected_logps = None
    if not plan.needs_nll:
        chosen_nll = None
    if not plan.needs_lengths:
        chosen_lengths = rejected_lengths = None
    elif chosen_lengths is not None and rejected_lengths is not None:
        if chosen_lengths.dtype is not int64 or rejected_lengths.dtype is not int64:
            chosen_lengths, rejected_lengths = chosen_lengths.to(int64), rejected_lengths.to(int64)
        # Another device would have to be waited for; there the caller has the lengths to look at.
        on_cpu = chosen_lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and has_empty(chosen_lengths, rejected_lengths):
            warn_empty_completions(chosen_lengths, rejected_lengths)
    out = run_pairs(
        (
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_lengths,
            rejected_lengths,
            chosen_nll,
            pair_weights,
        ),
        plan,
        _REDUCTION_CODES[reduction],
    )
    return PreferenceLoss(out[1] if reduction == "none" else out[0], *out[1:])


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
    """Loss of B completions that are each marked desirable or undesirable, not compared in pairs.

    With r = logps - ref_logps (nats), desirable / undesirable:

        kto                1 - sigmoid(beta (r - kl)) / 1 - sigmoid(beta (kl - r)), kl >= 0
                           arXiv 2402.01306: the usual choice
        apo_zero_unpaired  1 - sigmoid(beta r) / sigmoid(beta r)
                           arXiv 2408.06266: needs no estimate of the KL divergence
        bco                -ls(beta r - delta) / -ls(-(beta r - delta)), ls = log sigmoid
                           arXiv 2404.04656: a classifier

    Args:
        logps, ref_logps: `[B]` float32 or float64, log-probs of the completions in nats.
        labels: `[B]` bool, True = desirable. A batch of one class is normal.
        loss_type: one of the names above.
        beta: > 0.
        kl: of kto, required: the batch's KL divergence in nats, a number or one-value tensor (0.0
            to mean none); negative counts as 0. No gradient.
        delta: of bco: the running mean of the rewards. No gradient.
        desirable_weight, undesirable_weight: factors on the losses of each class.
        reduction: "mean" or "sum" over completions, "none" for `loss` = `losses`.

    Returns:
        UnpairedLoss: `loss`, `losses` [B] (differentiable, once), `rewards` [B] = beta r. The mean
        counts the completions that are there; of none it is 0.

    Raises:
        ValueError, TypeError: a need that is missing, an option the loss does not use, a wrong
            shape, dtype or name.

    Example:
        >>> import torch
        >>> logps, ref_logps = torch.tensor([-10.0, -12.0]), torch.tensor([-11.0, -11.0])
        >>> unpaired_loss(logps, ref_logps, torch.tensor([True, False]), kl=0.0).loss
        tensor(0.4750)
    """
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
    device = logps.device.type
    if not _load.native(device):
        _load.warn_fallback(device)
        return reference.unpaired_loss(
            logps,
            ref_logps,
            labels,
            loss_type=loss_type,
            beta=beta,
            kl=kl,
            delta=delta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            reduction=reduction,
        )
    refuse_transforms()
    shift = kl if loss.uses_kl else delta
    value = shift.detach() if isinstance(shift, Tensor) else None
    number = 0.0 if shift is None or isinstance(shift, Tensor) else float(shift)
    total, losses, rewards = run_unpaired(
        logps,
        ref_logps,
        labels,
        value,
        (loss.code, float(beta), number, float(desirable_weight), float(undesirable_weight)),
        _REDUCTION_CODES[reduction],
    )
    return UnpairedLoss(losses if reduction == "none" else total, losses, rewards)
