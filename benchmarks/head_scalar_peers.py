"""Contestants of the head benchmark that give a loss: a scalar, no log-prob of a token, no metric.

Liger's losses fix the upstream gradient. They are verified by their loss and by the gradient of the
hidden states. Liger needs Triton to be importable; on a CPU its Triton kernel does not run
(`liger_ce`), its chunked DPO loss does, as the plain torch and torch.compile that it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.head_problem import TOLERANCES, Answer, Problem, completion_rows, relative_error

BETA = 0.1  # of Liger's DPO loss


class ScalarAnswer(NamedTuple):
    loss: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | None


def _scalar_answer(p: Problem, loss: Tensor) -> ScalarAnswer:
    if p.head == "nograd":
        return ScalarAnswer(loss, None, None)
    inputs = [p.hidden, p.weight] if p.head == "trained" else [p.hidden]
    gradients = torch.autograd.grad(loss, inputs)
    return ScalarAnswer(loss.detach(), gradients[0], gradients[1] if len(gradients) > 1 else None)


def liger_ce(p: Problem) -> Callable[[], ScalarAnswer]:
    """Liger's fused linear cross-entropy, the mean over the completion rows, which it is given."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    function = LigerFusedLinearCrossEntropyLoss(softcap=p.softcap)

    def call() -> ScalarAnswer:
        with p.autocast():
            loss = function(p.weight, p.hidden[p.mask], p.labels[p.mask])
        return _scalar_answer(p, loss)

    return call


def liger_dpo(p: Problem) -> Callable[[], ScalarAnswer]:
    """Liger's fused DPO loss with the reference's log-probs left out (zeros); it projects every
    position, prompt or not. Sequences are averaged, so that the loss is not saturated."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    if p.softcap is not None:
        raise NotImplementedError("it has no softcap")
    function = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, average_log_prob=True)

    def call() -> ScalarAnswer:
        with p.autocast():
            loss, _ = function(p.weight, p.hidden, p.labels)
        return _scalar_answer(p, loss)

    return call


def upstream_of(peer: str, p: Problem, logps: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a scalar peer and what it multiplies each completion row's gradient by."""
    if peer == "liger_ce":
        return -logps.mean(), torch.full_like(logps, -1 / len(logps))
    per_sequence = logps.view(len(p.labels), -1)
    x = logps.new_tensor(BETA) * (
        per_sequence[: len(p.labels) // 2] - per_sequence[len(p.labels) // 2 :]
    ).mean(1)
    pairs = len(x)
    slope = -BETA * torch.sigmoid(-x) / pairs / per_sequence.shape[1]
    c = torch.cat([slope, -slope]).unsqueeze(1).expand_as(per_sequence).reshape(-1)
    return -torch.nn.functional.logsigmoid(x).sum() / pairs, c


def verify(peer: str, p: Problem, answer: ScalarAnswer, truth: Answer) -> dict[str, Any]:
    """As head_problem.verify; the exact gradient of a row is that of the truth, scaled."""
    limits = TOLERANCES[p.dtype]
    loss, c = upstream_of(peer, p, truth.outputs["logps"])
    errors = {"loss": abs(answer.loss.double() - loss).item()}
    ok = errors["loss"] <= limits["outputs"]
    if truth.grad_hidden is not None and answer.grad_hidden is not None:
        scale = c / p.upstream[p.mask].double()
        mine = completion_rows(p, answer.grad_hidden)
        exact = truth.grad_hidden * scale.unsqueeze(1)
        errors["grad_hidden"] = relative_error(mine, exact)
        ok = ok and errors["grad_hidden"] <= limits["gradients"]
    return {"ok": ok, "errors": errors, "tolerances": limits}


PEERS: dict[str, Callable[[Problem], Callable[[], ScalarAnswer]]] = {
    "liger_ce": liger_ce,
    "liger_dpo": liger_dpo,
}
