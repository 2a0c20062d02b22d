"""Shapes, gradients and refusals of the loss operators, and the short way through them.

Import this module only where the operators are loaded. `fusedpo.losses` calls `run_pairs` and
`run_unpaired` after checking arguments. Both compute every derivative in forward; backward is one
operator that scales them. Outside a compiled graph they attach it by a plain autograd.Function
around the call below autograd: for [B] numbers the bookkeeping of a registered autograd rule costs
more than the losses. The registered rule serves torch.compile and direct callers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import _register_fake

_ops = torch.ops.fusedpo
_BITS = (1, 2, 4, 8, 16)  # chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, nll
_LOGPS = 15
# needs -> which of the five inputs
_POSITIONS = [[i for i, bit in enumerate(_BITS) if needs & bit] for needs in range(32)]


def _needs(*tensors: Tensor | None) -> int:
    if not torch.is_grad_enabled():
        return 0
    needs = 0
    for bit, tensor in zip(_BITS, tensors, strict=True):
        if tensor is not None and tensor.requires_grad:
            needs |= bit
    return needs


# ---- fake kernels -------------------------------------------------------------------------------


@_register_fake("fusedpo::preference_loss")
def _(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    chosen_nll: Tensor | None,
    pair_weights: Tensor | None,
    losses: list[int],
    *rest: Any,
) -> tuple[Any, ...]:
    needs, count = rest[-1], chosen.shape[0]
    sorting = len({code for code in losses if code in _SORTING}) if needs & _LOGPS else 0
    gradients = order = None
    if needs:
        gradients = chosen.new_empty((needs.bit_count() + sorting, count))
    if sorting:
        order = chosen.new_empty((2 * sorting, count), dtype=torch.int64)
    return chosen.new_empty(()), *(torch.empty_like(chosen) for _ in range(5)), gradients, order


@_register_fake("fusedpo::unpaired_loss")
def _(logps: Tensor, *rest: Any) -> tuple[Any, ...]:
    needs = rest[-1]
    gradients = logps.new_empty((needs.bit_count(), logps.shape[0])) if needs else None
    return (
        logps.new_empty(()),
        logps.new_empty(logps.shape),
        logps.new_empty(logps.shape),
        gradients,
    )


@_register_fake("fusedpo::loss_backward")
def _(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    gradients: Tensor,
    order: Tensor | None,
    needs: int,
    sorted_bits: int,
    reduction: int,
    one_nll: bool,
) -> tuple[Any, ...]:
    def grad(bit: int) -> Tensor | None:
        if not needs & bit:
            return None
        return gradients.new_empty(() if one_nll and bit == 16 else (gradients.shape[1],))

    return tuple(grad(bit) for bit in _BITS)


@_register_fake("fusedpo::has_empty_completion")
def _(chosen_lengths: Tensor, rejected_lengths: Tensor) -> bool:
    return False  # nobody knows: no warning


_SORTING = {10: 1, 11: 2}  # codes of the losses that sort the batch, and their bits


# ---- registered autograd ------------------------------------------------------------------------


class _Refuse(torch.autograd.Function):
    """Passes gradients on and connects them to the inputs, by an edge that cannot be followed.

    Backward reads no input, so a graph of it (create_graph=True) would leave the second derivative
    out without a word.
    """

    @staticmethod
    def forward(ctx: Any, inputs: tuple[Any, ...], *tensors: Any) -> tuple[Any, ...]:
        return tensors[: len(tensors) - len(inputs)]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        _refuse_second_derivative(ctx, *grads)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "fusedpo's losses have no second derivative; use fusedpo.reference for it."
    )


def _guarded(grads: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """`grads`, in a graph of the backward with an edge to the inputs."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    refuse: Any = _Refuse.apply
    return tuple(refuse(inputs, *grads, *inputs))


def _pairs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *others, gradients, order = output[2:]
    ctx.save_for_backward(gradients, order)
    nll, codes, ctx.reduction, ctx.needs = inputs[6], inputs[8], inputs[18], inputs[19]
    ctx.one_nll = nll is not None and nll.dim() == 0
    ctx.sorted_bits = sum({_SORTING.get(code, 0) for code in codes})
    ctx.inputs = (*inputs[:4], nll)
    saved = (*others, gradients, order)
    ctx.mark_non_differentiable(*(x for x in saved if x is not None))
    ctx.set_materialize_grads(False)


def _pairs_backward(ctx: Any, grad_loss: Any, grad_losses: Any, *_: Any) -> tuple[Any, ...]:
    gradients, order = ctx.saved_tensors
    if gradients is None or (grad_loss is None and grad_losses is None):
        return (None,) * 20
    grads = _ops.loss_backward.default(
        grad_loss,
        grad_losses,
        gradients,
        order,
        ctx.needs,
        ctx.sorted_bits,
        ctx.reduction,
        ctx.one_nll,
    )
    *logps, nll = _guarded(grads, ctx.inputs)
    return (*logps, None, None, nll, *(None,) * 13)


def _unpaired_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, rewards, gradients = output
    ctx.save_for_backward(gradients)
    ctx.reduction, ctx.needs = inputs[9], inputs[10]
    ctx.inputs = inputs[:2]
    ctx.mark_non_differentiable(*(x for x in (rewards, gradients) if x is not None))
    ctx.set_materialize_grads(False)


def _unpaired_backward(ctx: Any, grad_loss: Any, grad_losses: Any, *_: Any) -> tuple[Any, ...]:
    (gradients,) = ctx.saved_tensors
    if gradients is None or (grad_loss is None and grad_losses is None):
        return (None,) * 11
    grads = _ops.loss_backward.default(
        grad_loss, grad_losses, gradients, None, ctx.needs, 0, ctx.reduction, False
    )
    return (*_guarded((grads[0], grads[2]), ctx.inputs), *(None,) * 9)


torch.library.register_autograd(
    "fusedpo::preference_loss", _pairs_backward, setup_context=_pairs_setup
)
torch.library.register_autograd(
    "fusedpo::unpaired_loss", _unpaired_backward, setup_context=_unpaired_setup
)
# Without a rule torch would warn and go on with zeros.
torch.library.register_autograd("fusedpo::loss_backward", _refuse_second_derivative)


# ---- the short way ------------------------------------------------------------------------------


class _Attach(torch.autograd.Function):
    """Gives loss and losses, the first two of `results`, their gradients for `inputs`.

    `saved` are the further arguments of loss_backward, and the positions of `inputs` among its
    results.
    """

    @staticmethod
    def forward(
        ctx: Any, results: tuple[Any, ...], saved: tuple[Any, ...], *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradients, order, *ctx.options = saved
        ctx.save_for_backward(gradients, order)
        ctx.inputs = inputs
        ctx.set_materialize_grads(False)
        return results[0], results[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *options, positions = ctx.options
        if grads[0] is None and grads[1] is None:
            return (None,) * (2 + len(positions))
        gradients, order = ctx.saved_tensors
        with torch._C._AutoDispatchBelowAutograd():
            scaled = _loss_backward(*grads, gradients, order, *options)
        wanted = tuple([scaled[i] for i in positions])
        return None, None, *_guarded(wanted, ctx.inputs)


_attach: Any = _Attach.apply
has_empty = _ops.has_empty_completion.default
_preference_loss = _ops.preference_loss.default
_unpaired_loss = _ops.unpaired_loss.default
_loss_backward = _ops.loss_backward.default


def run_pairs(
    tensors: tuple[Tensor | None, ...], plan: Any, reduction: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Call the operator; `tensors` are its tensor arguments and `plan` a checked PairPlan."""
    sources = (*tensors[:4], tensors[6])
    needs = _needs(*sources)
    options = (*plan.operator_options, reduction, needs)
    if torch.compiler.is_compiling():
        return _preference_loss(*tensors, *options)[:6]  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        results = _preference_loss(*tensors, *options)
    if needs == 0:
        return results[:6]  # type: ignore[no-any-return]
    nll = tensors[6]
    positions = _POSITIONS[needs]
    one_nll = nll is not None and nll.dim() == 0
    saved = (*results[6:], needs, plan.sorted_bits, reduction, one_nll, positions)
    return *_attach(results, saved, *[sources[i] for i in positions]), *results[2:6]


def run_unpaired(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    shift_value: Tensor | None,
    options: tuple[Any, ...],
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator; `options` are its arguments from `loss` to `undesirable_weight`."""
    sources = (logps, None, ref_logps, None, None)
    needs = _needs(*sources)
    call = (logps, ref_logps, labels, shift_value, *options, reduction, needs)
    if torch.compiler.is_compiling():
        return _unpaired_loss(*call)[:3]  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        results = _unpaired_loss(*call)
    if needs == 0:
        return results[:3]  # type: ignore[no-any-return]
    positions = _POSITIONS[needs]
    saved = (results[3], None, needs, 0, reduction, False, positions)
    return *_attach(results, saved, *[sources[i] for i in positions]), results[2]
