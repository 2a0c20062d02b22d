"""The problem of the head benchmark, its exact answer, and how far a contestant may be off."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

METRICS = ("entropy", "mean_logits", "is_top1")  # what TRL's DPOTrainer logs
IGNORE = -100
DTYPES = ("fp32", "bf16", "amp")
HEADS = ("frozen", "trained", "nograd")


class Answer(NamedTuple):
    """Outputs and gradients, of the completion rows or, as [B, T], of all positions."""

    outputs: dict[str, Tensor]
    grad_hidden: Tensor | None  # [..., H]
    grad_weight: Tensor | None  # [V, H]


class Problem(NamedTuple):
    dtype: str  # of DTYPES; amp: float32 tensors, bf16 autocast
    head: str  # of HEADS
    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [B, T], IGNORE on the prompt
    upstream: Tensor  # [B, T] gradient of the log-probs, 0 on the prompt
    softcap: float | None = None

    @property
    def mask(self) -> Tensor:
        return self.labels != IGNORE

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == "amp":
            return torch.autocast(self.hidden.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def rounded(self) -> tuple[Tensor, Tensor]:
        """The completion rows of hidden, and the weight, in the dtype of their product."""
        dtype = torch.float32 if self.dtype == "fp32" else torch.bfloat16
        return self.hidden[self.mask].to(dtype), self.weight.to(dtype)


@functools.lru_cache(maxsize=1)
def _random_weight(vocabulary: int, size: int) -> Tensor:
    """Kept for the next problem of that shape: it takes seconds to draw."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(vocabulary, size, generator=g).mul_(2.5 / size**0.5)


def make_problem(
    dtype: str, head: str, vocabulary: int, *, rows: int = 256, share: int = 50, size: int = 896
) -> Problem:
    """`rows` completion rows, `share` percent of all positions, in two sequences (one if they
    cannot be halved). Logits are peaked: a spread of 2.5 nats, a favourite 6 spreads above, half
    the labels on it.
    """
    positions = rows * 100 // share
    g = torch.Generator().manual_seed(1)
    weight = _random_weight(vocabulary, size).detach()
    favourite = torch.randint(vocabulary, (positions,), generator=g)
    hidden = torch.randn(positions, size, generator=g) + 2.5 * weight[favourite]
    other = torch.randint(vocabulary, (positions,), generator=g)
    labels = torch.where(torch.rand(positions, generator=g) < 0.5, favourite, other)
    labels = labels.view(1 if rows % 2 else 2, -1)
    labels[:, : labels.shape[1] - rows // len(labels)] = IGNORE
    upstream = torch.randn(labels.shape, generator=g) / rows
    tensor_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    return Problem(
        dtype,
        head,
        hidden.to(tensor_dtype).view(*labels.shape, size).requires_grad_(head != "nograd"),
        weight.to(tensor_dtype).requires_grad_(head == "trained"),
        labels,
        upstream.masked_fill(labels == IGNORE, 0),
    )


def exact(p: Problem) -> Answer:
    """Float64 on the inputs as they are multiplied, a few rows at a time."""
    x, w = (t.detach().double() for t in p.rounded())
    labels, c = p.labels[p.mask], p.upstream[p.mask].double()
    outputs: dict[str, list[Tensor]] = {name: [] for name in ("logps", *METRICS)}
    grad_hidden = torch.empty_like(x)
    grad_weight = torch.zeros_like(w) if p.head == "trained" else None
    rows_at_once = 64 if x.device.type == "cpu" else 512
    for rows in torch.arange(len(x), device=x.device).split(rows_at_once):
        y = x[rows] @ w.T
        z = y if p.softcap is None else p.softcap * torch.tanh(y / p.softcap)
        log_p = z.log_softmax(-1)
        probs = log_p.exp()
        outputs["logps"].append(log_p.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1))
        outputs["entropy"].append(-(probs * log_p).sum(-1))
        outputs["mean_logits"].append(z.mean(-1))
        outputs["is_top1"].append(z.argmax(-1) == labels[rows])
        if p.head != "nograd":
            grad_z = -probs
            grad_z[torch.arange(len(rows), device=x.device), labels[rows]] += 1
            grad_z *= c[rows].unsqueeze(-1)
            if p.softcap is not None:
                grad_z *= 1 - (z / p.softcap).square()
            grad_hidden[rows] = grad_z @ w
            if grad_weight is not None:
                grad_weight += grad_z.T @ x[rows]
    joined = {name: torch.cat(parts) for name, parts in outputs.items()}
    return Answer(joined, None if p.head == "nograd" else grad_hidden, grad_weight)


# Root mean square in nats for outputs, relative to the norm for gradients, share for is_top1. In
# bf16 the products may be rounded to bf16 (8 bits, logits near 30), and eager rounds log_softmax.
TOLERANCES = {
    "fp32": {"outputs": 1e-4, "gradients": 1e-4, "is_top1": 0.0},
    "bf16": {"outputs": 0.1, "gradients": 0.03, "is_top1": 0.02},
    "amp": {"outputs": 0.1, "gradients": 0.03, "is_top1": 0.02},
}


def completion_rows(p: Problem, value: Tensor) -> Tensor:
    return value[p.mask] if value.shape[: p.labels.ndim] == p.labels.shape else value


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def verify(p: Problem, answer: Answer, truth: Answer) -> dict[str, Any]:
    """{"ok": bool, "errors": {name: error}, "tolerances": ...}"""
    limits = TOLERANCES[p.dtype]
    errors: dict[str, float] = {}
    ok = True
    for name, output in answer.outputs.items():
        value = completion_rows(p, output)
        if name == "is_top1":
            errors[name] = (value != truth.outputs[name]).double().mean().item()
        else:
            errors[name] = (value.double() - truth.outputs[name]).square().mean().sqrt().item()
        ok = ok and errors[name] <= limits["is_top1" if name == "is_top1" else "outputs"]
    for name in ("grad_hidden", "grad_weight"):
        mine, his = getattr(answer, name), getattr(truth, name)
        if (mine is None) != (his is None):
            ok = False
        elif mine is not None:
            errors[name] = relative_error(
                completion_rows(p, mine) if name == "grad_hidden" else mine, his
            )
            ok = ok and errors[name] <= limits["gradients"]
    return {"ok": ok, "errors": errors, "tolerances": limits}
