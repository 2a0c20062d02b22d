"""Shapes, gradients and refusals of the C++ operators in ``torch.ops.fusedpo``.

``csrc/ops/schemas.cpp`` says what each operator takes and returns. Import this module only where
the operators are loaded; the public functions in ``fusedpo.logps`` do, after checking arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

METRIC_BITS = {"entropy": 1, "log_sum_sq_probs": 2, "mean_logits": 4, "is_top1": 8}
_HIDDEN, _LORA_HIDDEN = 1, 8  # bits of `needs` and `want_grads`: one per tensor argument, in order
# Device types that keep logits as rows of the whole vocabulary: padded, and without anchors.
_KEEP_WHOLE_ROWS = {"cuda"}

_ops = torch.ops.fusedpo
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _register_fake(name: str) -> Callable[[_Function], _Function]:
    """torch.library.register_fake, which has no types."""
    decorator: Callable[[_Function], _Function] = torch.library.register_fake(name)
    return decorator


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_columns(vocabulary: Any, device_type: str) -> Any:
    """Values of a row of logits that is kept for the gradients of weight, bias and lora_weight."""
    return (vocabulary + 63) // 64 * 64 if device_type in _KEEP_WHOLE_ROWS else vocabulary


def _fake_rows(
    like: Tensor, labels: Tensor, dtype: torch.dtype, metrics: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    def rows(bit: int, kind: torch.dtype) -> Tensor | None:
        return like.new_empty(labels.shape, dtype=kind) if metrics & bit else None

    logps = like.new_empty(labels.shape, dtype=dtype)
    return logps, rows(1, dtype), rows(2, dtype), rows(4, dtype), rows(8, torch.bool)


# ---- token_logps --------------------------------------------------------------------------------


@_register_fake("fusedpo::token_logps")
def _(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    metrics: int,
    inplace_backward: bool = False,
) -> tuple[Any, ...]:
    dtype = _result_dtype(logits.dtype)
    stats = logits.new_empty((labels.numel(), 3), dtype=dtype)
    return *_fake_rows(logits, labels, dtype, metrics), stats


@_register_fake("fusedpo::token_logps_backward")
def _(grad_logps: Any, grad_entropy: Any, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_register_fake("fusedpo::token_logps_backward_")
def _(grad_logps: Any, grad_entropy: Any, logits: Tensor, *rest: Any) -> None:
    return None


def _token_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logits, labels, ctx.ignore_index, ctx.temperature, _, ctx.inplace = inputs
    _, entropy, *others, stats = output
    ctx.save_for_backward(logits, labels, entropy, stats)
    ctx.mark_non_differentiable(stats, *(x for x in others if x is not None))
    ctx.set_materialize_grads(False)


def _token_backward(ctx: Any, grad_logps: Any, grad_entropy: Any, *_: Any) -> tuple[Any, ...]:
    if grad_logps is None and grad_entropy is None:
        return (None,) * 6
    logits, labels, entropy, stats = ctx.saved_tensors
    rest = (labels, entropy, stats, ctx.ignore_index, ctx.temperature)
    if not ctx.inplace:
        grad = _ops.token_logps_backward.default(grad_logps, grad_entropy, logits, *rest)
        return grad, None, None, None, None, None
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "inplace_backward cannot record a graph of the backward (create_graph=True); "
            "pass inplace_backward=False."
        )
    logits = logits.detach()
    _ops.token_logps_backward_.default(grad_logps, grad_entropy, logits, *rest)
    # A later use of these logits in backward must fail instead of reading the gradient.
    torch.autograd.graph.increment_version(logits)
    return logits, None, None, None, None, None


torch.library.register_autograd("fusedpo::token_logps", _token_backward, setup_context=_token_setup)


# ---- linear_token_logps -------------------------------------------------------------------------


@_register_fake("fusedpo::linear_token_logps")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float,
    logit_scale: float,
    metrics: int,
    compute_dtype: torch.dtype,
    vocab_tile: int,
    want_grads: int,
    keep_rows: int,
) -> tuple[Any, ...]:
    dtype = _result_dtype(compute_dtype)
    count, vocabulary = labels.numel(), weight.shape[0]

    def saved(rows: Any, columns: Any, kind: torch.dtype, wanted: bool) -> Tensor | None:
        return hidden.new_empty((rows, columns), dtype=kind) if wanted else None

    stats = saved(count, 4, dtype, True)
    unit = saved(count, hidden.shape[-1], dtype, bool(want_grads & _HIDDEN))
    lora_columns = 0 if lora_weight is None else lora_weight.shape[1]
    lora_unit = saved(count, lora_columns, dtype, bool(want_grads & _LORA_HIDDEN))
    sym_min: Any = torch.sym_min  # untyped
    keeps, kept_rows = keep_rows > 0, sym_min(count, keep_rows)
    device_type = hidden.device.type
    kept = saved(kept_rows, kept_columns(vocabulary, device_type), compute_dtype, keeps)
    tiles = (vocabulary + vocab_tile - 1) // vocab_tile
    anchors = saved(kept_rows, tiles, dtype, keeps and device_type not in _KEEP_WHOLE_ROWS)
    scored = labels.new_empty((1,), device="cpu")
    results = _fake_rows(hidden, labels, dtype, metrics)
    return *results, stats, unit, lora_unit, kept, anchors, scored


@_register_fake("fusedpo::linear_token_logps_backward_hidden")
def _(
    grad_logps: Tensor, unit_grad: Tensor, labels: Tensor, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    return unit_grad.new_empty((*labels.shape, unit_grad.shape[1]), dtype=dtype)


@_register_fake("fusedpo::linear_token_logps_backward")
def _(grad_logps: Any, grad_entropy: Any, *inputs: Any) -> tuple[Any, ...]:
    parameters, needs = inputs[:5], inputs[-1]
    return tuple(
        x.new_empty(x.shape) if x is not None and needs & (1 << i) else None
        for i, x in enumerate(parameters)
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    parameters, labels, ctx.options = inputs[:5], inputs[5], inputs[6:13]
    _, entropy, sums, means, top1, stats, unit, lora_unit, kept, anchors, count = output
    hidden, lora_hidden = parameters[0], parameters[3]
    ctx.hidden_dtype = hidden.dtype
    ctx.lora_dtype = None if lora_hidden is None else lora_hidden.dtype
    # With unit gradients and a frozen head, backward reads neither weight nor hidden, unless the
    # entropy's gradient is asked for.
    _, weight_needs, bias_needs, _, lora_weight_needs = ctx.needs_input_grad[:5]
    unit_missing = (ctx.needs_input_grad[0] and unit is None) or (
        ctx.needs_input_grad[3] and lora_unit is None
    )
    recomputes = unit_missing or entropy is not None
    if not (recomputes or weight_needs or bias_needs or lora_weight_needs):
        parameters = (None,) * 5
    ctx.save_for_backward(
        *parameters, labels, entropy, stats, unit, lora_unit, kept, anchors, count
    )
    saved = (sums, means, top1, stats, unit, lora_unit, kept, anchors, count)
    ctx.mark_non_differentiable(*(x for x in saved if x is not None))
    ctx.set_materialize_grads(False)


def _recorded(unit: Tensor | None) -> Tensor | None:
    return unit.detach().requires_grad_() if unit is not None and torch.is_grad_enabled() else unit


def _linear_backward(ctx: Any, grad_logps: Any, grad_entropy: Any, *_: Any) -> tuple[Any, ...]:
    grads: list[Any] = [None] * 5
    if grad_logps is None and grad_entropy is None:
        return (*grads, *(None,) * 10)
    *parameters, labels, entropy, stats, unit, lora_unit, kept, anchors, count = ctx.saved_tensors
    ignore_index = ctx.options[0]
    needs = sum(1 << i for i in range(5) if ctx.needs_input_grad[i])
    formed = 0
    if grad_entropy is None:
        # The unit gradients depend on hidden and weight, too: under create_graph the refusal of a
        # second derivative has to see that.
        unit, lora_unit = _recorded(unit), _recorded(lora_unit)
        scale_rows = _ops.linear_token_logps_backward_hidden.default
        if needs & _HIDDEN and unit is not None:
            grads[0] = scale_rows(grad_logps, unit, labels, ignore_index, ctx.hidden_dtype)
            formed |= _HIDDEN
        if needs & _LORA_HIDDEN and lora_unit is not None:
            grads[3] = scale_rows(grad_logps, lora_unit, labels, ignore_index, ctx.lora_dtype)
            formed |= _LORA_HIDDEN
    needs &= ~formed
    if needs:
        saved = (labels, entropy, stats, kept, anchors, count)
        # options: ignore_index, temperature, softcap, logit_scale, metrics, compute_dtype, tile
        options = (*ctx.options[:4], *ctx.options[5:7])
        recomputed = _ops.linear_token_logps_backward.default(
            grad_logps, grad_entropy, *parameters, *saved, *options, needs
        )
        grads = [new if old is None else old for old, new in zip(grads, recomputed, strict=True)]
    return (*grads, *(None,) * 10)


torch.library.register_autograd(
    "fusedpo::linear_token_logps", _linear_backward, setup_context=_linear_setup
)


# ---- second derivatives -------------------------------------------------------------------------


def _refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "fusedpo's log-probs have no second derivative; use fusedpo.reference for it."
    )


# Without a rule torch would warn and go on with zeros.
for _name in (
    "token_logps_backward",
    "linear_token_logps_backward_hidden",
    "linear_token_logps_backward",
):
    torch.library.register_autograd(f"fusedpo::{_name}", _refuse_second_derivative)
