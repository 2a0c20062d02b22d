"""Log-probabilities in plain PyTorch: definition, fallback, and what tests compare with.

Written to be read, not to be fast: every logit of the scored rows exists at once. Works on any
device and in float64. Rows whose label is ``ignore_index`` are left out before anything is
computed, so whatever they hold (NaN, too) can reach neither a result nor a gradient; their own
gradient is zero and the graph stays connected when none is left.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import METRICS, check_linear, check_pair_logps, check_token_logps

__all__ = [
    "METRICS",
    "PairLogps",
    "TokenLogps",
    "linear_token_logps",
    "pair_logps",
    "token_logps",
]


class TokenLogps(NamedTuple):
    """Results per token, each shaped like the labels, in nats; None for a metric not asked for."""

    logps: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


class PairLogps(NamedTuple):
    """Log-probabilities [B] of whole completions in nats, and their lengths [B] in tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    metrics: Sequence[str] = (),
    inplace_backward: bool = False,
) -> TokenLogps:
    """Score `labels` [...] under `logits` [..., V].

    `inplace_backward` is accepted and changes nothing here: the gradient is always a new tensor,
    and a second backward through a retained graph works. (The operators write the gradient over
    the logits.)
    """
    check_token_logps(logits, labels, ignore_index, temperature, metrics)
    del inplace_backward
    _check_label_range(labels, logits.shape[-1], ignore_index)
    keep = labels != ignore_index
    # Half precision is widened before the first reduction, never after it.
    z = _at_least_fp32(logits[keep]) / temperature
    return _score(z, labels, keep, metrics)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    metrics: Sequence[str] = (),
    lora: tuple[Tensor, Tensor, float] | None = None,
    logits_budget_bytes: int | None = None,
) -> TokenLogps:
    """Score `labels` [...] under the logits of `hidden` [..., H] and the head `weight` [V, H].

    The product follows ``F.linear``: its dtype is the inputs', under autocast the autocast dtype.
    `logits_budget_bytes` is accepted and changes nothing here.
    """
    check_linear(
        hidden,
        weight,
        labels,
        bias,
        ignore_index,
        temperature,
        softcap,
        logit_scale,
        metrics,
        lora,
        logits_budget_bytes,
    )
    lora_hidden = lora_weight = None
    if lora is not None:
        lora_hidden, lora_weight = apply_lora_a(hidden, labels, ignore_index, lora)
    return score_head(
        hidden,
        weight,
        labels,
        bias,
        lora_hidden,
        lora_weight,
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        metrics=metrics,
    )


def apply_lora_a(
    hidden: Tensor, labels: Tensor, ignore_index: int, lora: tuple[Tensor, Tensor, float]
) -> tuple[Tensor, Tensor]:
    """Return (scale * hidden @ A.T [..., r], B [V, r]).

    Ignored rows are taken as 0: what stands there must not reach A's gradient either.
    """
    lora_a, lora_b, lora_scale = lora
    scored = hidden.masked_fill((labels == ignore_index).unsqueeze(-1), 0)
    return F.linear(scored, lora_a) * lora_scale, lora_b


def score_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    *,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    metrics: Sequence[str],
) -> TokenLogps:
    """`linear_token_logps` after its checks; adapters add `lora_hidden @ lora_weight.T`."""
    _check_label_range(labels, weight.shape[0], ignore_index)
    keep = labels != ignore_index
    z = F.linear(hidden[keep], weight, bias)
    if lora_hidden is not None and lora_weight is not None:
        z = z + F.linear(lora_hidden[keep], lora_weight)
    z = _at_least_fp32(z) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return _score(z / temperature, labels, keep, metrics)


def _score(z: Tensor, labels: Tensor, keep: Tensor, metrics: Sequence[str]) -> TokenLogps:
    """z [kept rows, V] are the final logits; results are shaped like `labels`, 0 where not kept."""
    target = labels[keep]
    log_probs = torch.log_softmax(z, dim=-1)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(labels.shape).masked_scatter(keep, values)

    entropy = log_sum_sq_probs = mean_logits = is_top1 = None
    if "entropy" in metrics:
        # p log p is 0 at p = 0, where the plain product is 0 * -inf (a logit of -inf bars a token).
        finite = log_probs.masked_fill(log_probs == -torch.inf, 0)
        entropy = spread(-(log_probs.exp() * finite).sum(dim=-1))
    if "log_sum_sq_probs" in metrics:
        log_sum_sq_probs = spread(torch.logsumexp(2 * log_probs.detach(), dim=-1))
    if "mean_logits" in metrics:
        mean_logits = spread(z.detach().mean(dim=-1))
    if "is_top1" in metrics:
        is_top1 = spread(z.detach().argmax(dim=-1) == target)  # argmax takes the first maximum
    logps = spread(log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1))
    return TokenLogps(logps, entropy, log_sum_sq_probs, mean_logits, is_top1)


def pair_logps(
    logps: Tensor, completion_mask: Tensor, *, ld_alpha: float | None = None
) -> PairLogps:
    """Sum `logps` [2B, T] over each completion; rows 0..B-1 are chosen, rows B..2B-1 rejected.

    With `ld_alpha`, tokens past the length of the shorter completion of the pair count `ld_alpha`
    times (arXiv 2409.06411). Sums run in float64 and are rounded once. What stands at masked
    positions never matters.
    """
    check_pair_logps(logps, completion_mask, ld_alpha)
    mask = completion_mask != 0
    lengths = mask.sum(dim=1)
    values = exact(logps.masked_fill(~mask, 0))
    if ld_alpha is not None:
        pairs = mask.shape[0] // 2
        shorter = torch.minimum(lengths[:pairs], lengths[pairs:]).repeat(2)
        beyond = mask.cumsum(dim=1) > shorter.unsqueeze(1)
        # Off means off: 0 * -inf would be NaN.
        tail = ld_alpha * values if ld_alpha > 0 else torch.zeros_like(values)
        values = torch.where(beyond, tail, values)
    warn_empty_completions(lengths, stacklevel=3)
    chosen, rejected = values.sum(dim=1).to(logps.dtype).chunk(2)
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    return PairLogps(chosen, rejected, chosen_lengths, rejected_lengths)


def warn_empty_completions(*lengths: Tensor, stacklevel: int = 3) -> None:
    # Reading a value would break a compiled graph and stall another device; there the caller has
    # the lengths to look at.
    if torch.compiler.is_compiling() or lengths[0].device.type != "cpu":
        return
    if not all(bool(each.all()) for each in lengths):
        warnings.warn(
            "fusedpo: a completion has no token to score; its log-probability is 0. "
            "Was it cut off by max_length?",
            stacklevel=stacklevel,
        )


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def exact(tensor: Tensor) -> Tensor:
    """Float64, in which sums are exact enough to be rounded once; MPS has no more than float32."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _check_label_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    bad = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if bool(bad.any()):
        position = tuple(bad.nonzero()[0].tolist())
        raise RuntimeError(
            f"labels must be in [0, {vocabulary}) or equal ignore_index ({ignore_index}); "
            f"got {int(labels[position])} at position {position}"
        )
