"""Log-probabilities of labels from logits, or from hidden states and the LM head's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _load, reference
from ._check import check_linear, check_token_logps, linear_compute_dtype, refuse_transforms
from .reference import TokenLogps
from .reference.logps import apply_lora_a
from .reference.logps import score_head as reference_score_head

if TYPE_CHECKING or _load.native("cpu"):
    from .ops import METRIC_BITS, kept_columns

_BUDGETS = {"cpu": 256 * 2**20, "cuda": 5 * 2**29}  # logits kept for the weight's gradient, bytes
_MOST_ROWS = 2**62


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    metrics: Sequence[str] = (),
    inplace_backward: bool = False,
) -> TokenLogps:
    """Log-probability of each label under softmax(logits / temperature), in one read of the logits.

    Reductions run in float32 at least, whatever the dtype of the logits (float64 for float64), so
    half-precision logits need no upcast copy. Differentiable in `logits` through `logps` and
    `entropy`, once; the other metrics carry no gradient. Results do not depend on the number of
    threads, nor on what stands at ignored positions.

    Args:
        logits: `[..., V]`, float64, float32, bfloat16 or float16; any strides, `logits[:, :-1]` is
            read where it lies.
        labels: `[...]` int64, aligned with `logits`: the caller has shifted.
        ignore_index: rows with this label give 0 (False), and no gradient.
        temperature: what the logits are divided by, > 0.
        metrics: any of "entropy" (nats), "log_sum_sq_probs" (log sum_v p_v^2, nats),
            "mean_logits" (mean over V of logits / temperature) and "is_top1" (the label is the
            first maximum).
        inplace_backward: backward writes the gradient over `logits` instead of allocating it. The
            logits are gone then: a second backward through them raises. Not for leaves or expanded
            tensors. Under `torch.compile`, and without C++ operators, it has no effect.

    Returns:
        TokenLogps: fields shaped like `labels`, float32 (float64 for float64 logits, bool for
        `is_top1`); None for a metric not asked for.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or name.
        RuntimeError: a label outside [0, V); names the first position and value. (On CUDA such rows
            give NaN instead, unless FUSEDPO_CHECK=1 is set: to raise, the host has to wait.)

    Example:
        >>> logits = torch.zeros(2, 3, 8)
        >>> labels = torch.tensor([[1, 2, -100], [3, 4, 5]])
        >>> token_logps(logits, labels).logps
        tensor([[-2.0794, -2.0794,  0.0000],
                [-2.0794, -2.0794, -2.0794]])
    """
    check_token_logps(logits, labels, ignore_index, temperature, metrics)
    if inplace_backward:
        _check_inplace(logits)
    device = logits.device.type
    if not _load.native(device):
        _load.warn_fallback(device)
        return reference.token_logps(
            logits,
            labels,
            ignore_index=ignore_index,
            temperature=temperature,
            metrics=metrics,
            inplace_backward=inplace_backward,
        )
    refuse_transforms()
    out = torch.ops.fusedpo.token_logps.default(
        logits,
        labels,
        ignore_index,
        float(temperature),
        _metric_bits(metrics),
        inplace_backward and not torch.compiler.is_compiling(),
    )
    return TokenLogps(*out[:5])


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
    """Log-probability of each label under an LM head; the logits of the batch never exist.

    `z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature`, without
    `softcap` `z = logit_scale * (hidden @ weight.T + bias) / temperature`; `logps = z[label] -
    logsumexp(z)`. Rows whose label is `ignore_index` never reach a matrix product.

    The gradient of a log-prob for its hidden state does not depend on the loss: it is formed in
    forward, and backward only scales its rows. Matrix products over the vocabulary: 1 when nothing
    needs a gradient, 2 when only `hidden` does (LoRA, frozen head), 3 when `weight` does and the
    logits fit `logits_budget_bytes`, up to 4 past it. The gradient of the *entropy* recomputes the
    logits, only when it is asked for. Differentiable once, in hidden, weight, bias and lora.

    Under `torch.autocast` the arithmetic is that of `F.linear` there: operands are rounded to the
    autocast dtype tile by tile, never as a whole; sums stay in float32, and the gradient of a
    float32 weight is float32 and was never rounded to less.

    Args:
        hidden: `[..., H]`, float64, float32, bfloat16 or float16.
        weight: `[V, H]`, the LM head's weight as it is; dtype of `hidden` unless autocast is on.
        labels: `[...]` int64, aligned with `hidden`: the caller has shifted.
        bias: `[V]` or None.
        ignore_index: rows with this label give 0 (False), and no gradient.
        temperature: > 0.
        softcap: > 0 (Gemma's `final_logit_softcapping`) or None.
        logit_scale: factor on the logits before the cap (Cohere's `logit_scale`).
        metrics: any of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", as in
            `token_logps`; they cost no further matrix product.
        lora: None, or (A `[r, H]`, B `[V, r]`, scale) of an adapter on the head:
            `hidden @ weight.T + scale * (hidden @ A.T) @ B.T`, with gradients for A and B. (The
            small product with A runs over all positions.)
        logits_budget_bytes: how much of the logits may be kept for the gradients of weight, bias
            and B (None: 256 MiB on CPU, 2.5 GiB on CUDA); past it they are recomputed. On CUDA
            recomputed rows also cost a read and write of a float32 `[V, H]` per gibibyte of logits.

    Returns:
        TokenLogps: fields shaped like `labels`, in nats, float32 (float64 for float64 inputs, bool
        for `is_top1`); None for a metric not asked for.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or name.
        RuntimeError: a label outside [0, V); names the first position and value. (On CUDA such rows
            give NaN instead, unless FUSEDPO_CHECK=1 is set: to raise, the host has to wait.)

    Example:
        >>> hidden, weight = torch.zeros(2, 3, 16), torch.zeros(8, 16)
        >>> labels = torch.tensor([[1, 2, -100], [3, 4, 5]])
        >>> linear_token_logps(hidden, weight, labels).logps
        tensor([[-2.0794, -2.0794,  0.0000],
                [-2.0794, -2.0794, -2.0794]])
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
        logits_budget_bytes=logits_budget_bytes,
    )


def score_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    *,
    ignore_index: int = -100,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    metrics: Sequence[str],
    logits_budget_bytes: int | None = None,
) -> TokenLogps:
    """`linear_token_logps` behind its checks, for adapters whose input is not `hidden` as it is
    (dropout), or that are several: the logits are `hidden @ weight.T + lora_hidden @ lora_weight.T
    + bias`, with lora_hidden `[..., r]` finite at ignored positions, and lora_weight `[V, r]`.
    """
    device = hidden.device.type
    if not _load.native(device):
        _load.warn_fallback(device, stacklevel=4)
        return reference_score_head(
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
    refuse_transforms()
    compute_dtype = linear_compute_dtype(hidden)
    keep_rows, vocabulary = 0, weight.shape[0]
    if _needs_grad(weight, bias, lora_weight):
        budget = _BUDGETS[device] if logits_budget_bytes is None else logits_budget_bytes
        row_bytes = kept_columns(vocabulary, device) * compute_dtype.itemsize
        keep_rows = min(budget // row_bytes, _MOST_ROWS)
    out = torch.ops.fusedpo.linear_token_logps.default(
        hidden,
        weight,
        bias,
        lora_hidden,
        lora_weight,
        labels,
        ignore_index,
        float(temperature),
        0.0 if softcap is None else float(softcap),
        float(logit_scale),
        _metric_bits(metrics),
        compute_dtype,
        _vocab_tile(hidden.shape[-1], device),
        _needs_grad(hidden) * 1 + _needs_grad(lora_hidden) * 8,
        keep_rows,
    )
    return TokenLogps(*out[:5])


def _vocab_tile(size: int, device_type: str) -> int:
    """Vocabulary entries per matrix product.

    On a CPU an operand tile of about 2M values stays in cache. On CUDA tiles are only what a cast
    of the weight or a sum in float32 needs memory for: 64M values, 128 MiB in bfloat16.
    """
    if device_type == "cuda":
        return max(4096, 2**26 // max(size, 1) // 64 * 64)
    return max(256, min(4096, 2**21 // max(size, 1) // 64 * 64))


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _metric_bits(metrics: Sequence[str]) -> int:
    bits = 0
    for name in metrics:
        bits |= METRIC_BITS[name]
    return bits


def _check_inplace(logits: Tensor) -> None:
    base = logits._base if logits._is_view() else logits
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError(
            "inplace_backward=True needs logits that were computed, not a leaf that requires grad "
            "or a view of one: its values would be overwritten by its own gradient. "
            "Pass inplace_backward=False."
        )
    # Elements share no memory if each stride steps over everything the smaller strides reach.
    reach = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                "inplace_backward=True needs logits whose elements do not share memory; got shape "
                f"{list(logits.shape)} with strides {logits.stride()}. Pass inplace_backward=False."
            )
        reach += (size - 1) * stride
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            "inplace_backward=True needs logits whose last dimension is contiguous; got strides "
            f"{logits.stride()}. Pass inplace_backward=False."
        )
