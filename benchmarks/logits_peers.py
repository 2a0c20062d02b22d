"""Log-probs of logits that exist: the problem, its contestants and the check, on any device.

A contestant maps a problem and whether to go backward to (outputs by name, gradient or None).
Outputs are of all rows; those of the prompt, whose label is IGNORE, are compared by nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import fusedpo
import torch
from fusedpo import reference
from fusedpo.reference import METRICS
from torch import Tensor

IGNORE = -100
SAMPLE = 64  # rows that are verified
FIELDS = ("logps", *METRICS)


class Problem(NamedTuple):
    original: Tensor  # [N, V], never written
    logits: Tensor  # [N, V], what calls read; an in-place backward writes over it
    labels: Tensor  # [N], IGNORE on the prompt
    any_labels: Tensor  # [N], 0 on the prompt, for those that score it, too
    upstream: Tensor  # [N], 0 on the prompt

    def restore(self) -> None:
        self.logits.copy_(self.original)


class _Computed(torch.autograd.Function):
    """Hands out existing memory as logits that were computed, like a model's: no leaf, no copy."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, memory: list[Tensor]) -> Tensor:
        return memory[0].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def computed(p: Problem) -> Tensor:
    leaf = torch.zeros((), device=p.logits.device, dtype=p.logits.dtype, requires_grad=True)
    logits: Tensor = _Computed.apply(leaf, [p.logits])
    return logits


def make_problem(
    rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, share: int = 100
) -> Problem:
    """A bulk with a spread of 2.5 nats and a favourite at 20, which takes nearly all probability;
    half the labels are on it. `share` percent of the rows, the last ones, are completion."""
    g = torch.Generator(device).manual_seed(0)
    logits = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    logits.normal_(0, 2.5, generator=g)
    favourite = torch.randint(vocabulary, (rows,), generator=g, device=device)
    logits.scatter_(1, favourite.unsqueeze(1), 20.0)
    other = torch.randint(vocabulary, (rows,), generator=g, device=device)
    labels = torch.where(torch.rand(rows, generator=g, device=device) < 0.5, favourite, other)
    upstream = torch.randn(rows, generator=g, device=device) / rows
    prompt = rows - rows * share // 100
    labels[:prompt] = IGNORE
    upstream[:prompt] = 0
    return Problem(logits, logits.clone(), labels, labels.clamp(min=0), upstream)


# ---- contestants --------------------------------------------------------------------------------

Answer = tuple[dict[str, Tensor], Tensor | None]
Peer = Callable[[Problem, bool], Answer]


def finish(
    p: Problem, outputs: Mapping[str, Tensor | None], logits: Tensor, backward: bool
) -> Answer:
    logps = outputs["logps"]
    assert logps is not None
    gradient = None
    if backward:
        (gradient,) = torch.autograd.grad(logps, logits, p.upstream.to(logps.dtype))
    return {name: v.detach() for name, v in outputs.items() if v is not None}, gradient


def ours(metrics: tuple[str, ...] = (), inplace: bool = False) -> Peer:
    def call(p: Problem, backward: bool) -> Answer:
        logits = computed(p) if backward else p.logits
        out = fusedpo.token_logps(
            logits, p.labels, metrics=metrics, inplace_backward=inplace and backward
        )
        return finish(p, out._asdict(), logits, backward)

    return call


def logps_of(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"logps": logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)}


def outputs_of(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """All five, from one log_softmax."""
    log_p = logits.log_softmax(-1)
    logps = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():  # metrics carry no gradient in a DPO step
        entropy = -(log_p.exp() * log_p).sum(-1, dtype=torch.float32)
        sums = (2 * log_p.float()).logsumexp(-1)
        means = logits.mean(-1, dtype=torch.float32)
        is_top1 = logits.argmax(-1) == labels
    return dict(zip(FIELDS, (logps, entropy, sums, means, is_top1), strict=True))


def plain(function: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> Peer:
    """`function` of logits and labels, with autograd's backward."""

    def call(p: Problem, backward: bool) -> Answer:
        logits = computed(p) if backward else p.logits
        return finish(p, function(logits, p.any_labels), logits, backward)

    return call


def compiled(function: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> Peer:
    return plain(torch.compile(function, fullgraph=True, dynamic=False))


def trl_triton(p: Problem, backward: bool) -> Answer:
    from trl.kernels import selective_log_softmax_and_entropy

    logits = computed(p) if backward else p.logits
    logps, entropy = selective_log_softmax_and_entropy(logits, p.labels)
    return finish(p, {"logps": logps, "entropy": entropy.detach()}, logits, backward)


def trl_separate(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """All five, each by the expression that TRL's DPOTrainer ran up to 1.14, with TRL's own
    functions. (It took the argmax of the chosen half only, and copied the completion's logits
    before it averaged them.)"""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    batch = logits.view(2 if len(logits) % 2 == 0 else 1, -1, logits.shape[-1])
    logps = selective_log_softmax(batch, labels.view(batch.shape[:-1])).flatten()
    with torch.no_grad():
        entropy = entropy_from_logits(batch).flatten()
        lse1 = torch.logsumexp(batch, dim=-1)
        lse2 = torch.logsumexp(2.0 * batch, dim=-1)
        sums = (lse2 - 2.0 * lse1).flatten()
        means = batch.mean(-1).flatten()
        is_top1 = batch.argmax(dim=-1).flatten() == labels
    return dict(zip(FIELDS, (logps, entropy, sums, means, is_top1), strict=True))


# ---- the check ----------------------------------------------------------------------------------


def verify(p: Problem, answer: Answer, limits: Mapping[str, float]) -> dict[str, Any]:
    """Against float64 on a sample of the completion rows: root mean square in nats, relative for
    the gradient, share for is_top1. {"ok": bool, "errors": {name: error}, "tolerances": limits}"""
    outputs, gradient = answer
    scored = (p.labels != IGNORE).nonzero().flatten()
    rows = scored[:: max(1, len(scored) // SAMPLE)]
    x = p.original[rows].double().requires_grad_()
    exact = reference.token_logps(x, p.labels[rows], metrics=METRICS)._asdict()
    errors: dict[str, float] = {}
    for name, value in outputs.items():
        mine, his = value[rows], exact[name].detach()
        if name == "is_top1":
            errors[name] = (mine != his).double().mean().item()
        else:
            errors[name] = (mine.double() - his).square().mean().sqrt().item()
    ok = all(e <= limits["is_top1" if n == "is_top1" else "outputs"] for n, e in errors.items())
    if gradient is not None:
        (want,) = torch.autograd.grad(exact["logps"], x, p.upstream[rows].double())
        errors["gradient"] = ((gradient[rows].double() - want).norm() / want.norm()).item()
        ok = ok and errors["gradient"] <= limits["gradient"]
        prompt = gradient[p.labels == IGNORE]
        ok = ok and not bool(prompt.count_nonzero())
    return {"ok": ok, "errors": errors, "tolerances": dict(limits)}
