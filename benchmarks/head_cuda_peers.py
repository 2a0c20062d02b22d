"""The contestants that only a GPU benchmark of the head has, and its problems.

Liger's losses are scalars: they give no log-prob of a token and no metric, and fix the upstream
gradient. They are verified by their loss and by the gradient of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import head_peers
from benchmarks.head_peers import IGNORE, TOLERANCES, Answer, Problem, completion_rows

BETA = 0.1  # of Liger's DPO loss


class Shape(NamedTuple):
    size: int  # H
    vocabulary: int  # V
    softcap: float | None = None


SHAPES = {
    "llama-3-8b": Shape(4096, 128_256),
    "qwen2.5-0.5b": Shape(896, 151_936),
    "qwen2.5-7b": Shape(3584, 152_064),
    "gemma-2-2b": Shape(2304, 256_000, 30.0),
}
SEQUENCES, COMPLETION = 16, 8192  # 8 pairs; as many prompt tokens as completion tokens
REHEARSAL = {name: Shape(48, 1000, shape.softcap) for name, shape in SHAPES.items()}
REHEARSAL_COMPLETION = 128


def make_problem(
    shape: Shape, dtype: str, head: str, device: torch.device, completion: int
) -> Problem:
    """Peaked logits, as in head_peers.make_problem: a spread of 2.5 nats, a favourite 6 above."""
    g = torch.Generator(device).manual_seed(0)
    made: dict[str, Any] = {"generator": g, "device": device}
    positions = 2 * completion
    weight = torch.randn(shape.vocabulary, shape.size, **made) * (2.5 / shape.size**0.5)
    favourite = torch.randint(shape.vocabulary, (positions,), **made)
    hidden = torch.randn(positions, shape.size, **made) + 2.5 * weight[favourite]
    other = torch.randint(shape.vocabulary, (positions,), **made)
    labels = torch.where(torch.rand(positions, **made) < 0.5, favourite, other)
    labels = labels.view(SEQUENCES, -1)
    labels[:, : labels.shape[1] // 2] = IGNORE
    upstream = torch.randn(labels.shape, **made) / completion
    tensor_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    return Problem(
        dtype,
        head,
        hidden.to(tensor_dtype).view(SEQUENCES, -1, shape.size).requires_grad_(head != "nograd"),
        weight.to(tensor_dtype).requires_grad_(head == "trained"),
        labels,
        upstream.masked_fill(labels == IGNORE, 0),
        shape.softcap,
    )


def compiled(p: Problem) -> Callable[[], Answer]:
    """torch.compile of the eager expression, on completion rows picked before."""

    def logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = hidden @ weight.T
        if p.softcap is not None:
            logits = p.softcap * torch.tanh(logits / p.softcap)
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    torch._dynamo.reset()
    function = torch.compile(logps_of, fullgraph=True, dynamic=False)

    def call() -> Answer:
        with p.autocast():
            logps = function(p.hidden[p.mask], p.weight, p.labels[p.mask])
        outputs = {"logps": logps.detach()}
        return head_peers._answer(p, outputs, logps, p.upstream[p.mask])

    return call


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


def verify_scalar(peer: str, p: Problem, answer: ScalarAnswer, truth: Answer) -> dict[str, Any]:
    """As head_peers.verify; the exact gradient of a row is that of the truth, scaled."""
    limits = TOLERANCES[p.dtype]
    loss, c = upstream_of(peer, p, truth.outputs["logps"])
    errors = {"loss": abs(answer.loss.double() - loss).item()}
    ok = errors["loss"] <= limits["outputs"]
    if truth.grad_hidden is not None and answer.grad_hidden is not None:
        scale = c / p.upstream[p.mask].double()
        mine = completion_rows(p, answer.grad_hidden)
        exact = truth.grad_hidden * scale.unsqueeze(1)
        errors["grad_hidden"] = head_peers.relative_error(mine, exact)
        ok = ok and errors["grad_hidden"] <= limits["gradients"]
    return {"ok": ok, "errors": errors, "tolerances": limits}


SCALAR: dict[str, Callable[[Problem], Callable[[], ScalarAnswer]]] = {
    "liger_ce": liger_ce,
    "liger_dpo": liger_dpo,
}
PEERS: dict[str, Callable[[Problem], Callable[[], Any]]] = {
    "floor": head_peers.floor,
    "ours": head_peers.ours,
    "trl": head_peers.trl,
    "eager": head_peers.eager,
    "compile": compiled,
    **SCALAR,
}
