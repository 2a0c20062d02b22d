"""The contestants of the head benchmark, the problem they are given, and the exact answer to it.

A peer maps a problem to a function without arguments that runs forward (and backward) and returns
(outputs by name on the completion rows, gradient of hidden or None, gradient of weight or None).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import fusedpo
import torch
from torch import Tensor

POSITIONS, COMPLETION, SIZE, VOCABULARY = 512, 256, 896, 151_936
METRICS = ("entropy", "mean_logits", "is_top1")  # what TRL's DPOTrainer logs
IGNORE = -100
DTYPES = ("fp32", "bf16", "amp")
HEADS = ("frozen", "trained", "nograd")


class Answer(NamedTuple):
    """Outputs and gradients, of the completion rows or, as [2, T], of all positions."""

    outputs: dict[str, Tensor]
    grad_hidden: Tensor | None  # [..., H]
    grad_weight: Tensor | None  # [V, H]


class Problem(NamedTuple):
    dtype: str  # of DTYPES; amp: float32 tensors, bf16 autocast
    head: str  # of HEADS
    hidden: Tensor  # [2, T, H], 2 T = POSITIONS
    weight: Tensor  # [V, H]
    labels: Tensor  # [2, T], IGNORE on the prompt
    upstream: Tensor  # [2, T] gradient of the log-probs, 0 on the prompt
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


def make_problem(dtype: str, head: str, vocabulary: int = VOCABULARY) -> Problem:
    """Peaked logits: a spread of 2.5 nats, a favourite 6 spreads above, half the labels on it."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, SIZE, generator=g) * (2.5 / SIZE**0.5)
    favourite = torch.randint(vocabulary, (POSITIONS,), generator=g)
    hidden = torch.randn(POSITIONS, SIZE, generator=g) + 2.5 * weight[favourite]
    other = torch.randint(vocabulary, (POSITIONS,), generator=g)
    labels = torch.where(torch.rand(POSITIONS, generator=g) < 0.5, favourite, other).view(2, -1)
    labels[:, : labels.shape[1] - COMPLETION // 2] = IGNORE
    upstream = torch.randn(labels.shape, generator=g) / COMPLETION
    tensor_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    return Problem(
        dtype,
        head,
        hidden.to(tensor_dtype).view(2, -1, SIZE).requires_grad_(head != "nograd"),
        weight.to(tensor_dtype).requires_grad_(head == "trained"),
        labels,
        upstream.masked_fill(labels == IGNORE, 0),
    )


def _answer(p: Problem, outputs: dict[str, Tensor], logps: Tensor, upstream: Tensor) -> Answer:
    """Runs backward from `logps`, as p.head demands."""
    if p.head == "nograd":
        return Answer(outputs, None, None)
    inputs = [p.hidden, p.weight] if p.head == "trained" else [p.hidden]
    gradients = torch.autograd.grad(logps, inputs, upstream.to(logps.dtype))
    return Answer(outputs, gradients[0], gradients[1] if len(gradients) > 1 else None)


def ours(p: Problem) -> Callable[[], Answer]:
    def call() -> Answer:
        with p.autocast():
            out = fusedpo.linear_token_logps(
                p.hidden, p.weight, p.labels, softcap=p.softcap, metrics=METRICS
            )
        fields = out._asdict()
        outputs = {name: fields[name].detach() for name in ("logps", *METRICS)}
        return _answer(p, outputs, out.logps, p.upstream)

    return call


def trl(p: Problem) -> Callable[[], Answer]:
    """As the forward that add_fused_lm_head installs calls it: completion rows only where Triton
    runs, all positions elsewhere."""
    from trl.trainer.utils import (
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        _ChunkedLogProbFunction,
        _use_triton,
    )

    outputs_wanted = ("log_probs", *METRICS)
    compact = _use_triton(p.hidden.device)

    def place(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if compact:
            return x.new_zeros(p.mask.shape).masked_scatter(p.mask, x)
        return x.view(p.mask.shape).masked_fill(~p.mask, 0)

    def call() -> Answer:
        with p.autocast():
            results = _ChunkedLogProbFunction.apply(
                p.hidden[p.mask] if compact else p.hidden.reshape(-1, p.hidden.size(-1)),
                p.weight,
                None,
                p.labels[p.mask] if compact else p.labels.clamp(min=0).reshape(-1),
                1.0,
                _CHUNKED_LOGPROB_CHUNK_SIZE,
                p.softcap,
                1.0,
                outputs_wanted,
            )
            logps, entropy, _, mean_logits, is_top1 = (place(x) for x in results)
        fields = {
            "logps": logps,
            "entropy": entropy,
            "mean_logits": mean_logits,
            "is_top1": is_top1,
        }
        outputs = {name: value.detach() for name, value in fields.items()}
        return _answer(p, outputs, logps, p.upstream)

    return call


def eager(p: Problem) -> Callable[[], Answer]:
    """The plain expression on the completion rows; log-probs only, no metric."""

    def call() -> Answer:
        with p.autocast():
            logits = p.hidden[p.mask] @ p.weight.T
            if p.softcap is not None:
                logits = p.softcap * torch.tanh(logits / p.softcap)
            log_probs = torch.log_softmax(logits, dim=-1)
            logps = log_probs.gather(-1, p.labels[p.mask].unsqueeze(-1)).squeeze(-1)
        return _answer(p, {"logps": logps.detach()}, logps, p.upstream[p.mask])

    return call


def floor(p: Problem) -> Callable[[], None]:
    """Only the matrix products, on the completion rows, into buffers that exist.

    Under autocast the weight's gradient is float32; on CPU torch has a product with float32 output
    only for float32 operands.
    """
    x, w = p.rounded()
    x, w = x.detach(), w.detach()
    logits = x.new_zeros(len(x), len(w))
    grad_hidden = torch.zeros_like(x)
    on_cpu = x.device.type == "cpu"
    wide = torch.float32 if p.dtype == "amp" and on_cpu else x.dtype
    trained = p.head == "trained"
    grad_logits = (logits.to(wide) if wide != x.dtype else logits).T
    x_wide = x.to(wide)
    grad_weight = torch.zeros_like(w, dtype=wide) if trained else None

    def call() -> None:
        torch.mm(x, w.T, out=logits)
        if p.head != "nograd":
            torch.mm(logits, w, out=grad_hidden)
        if grad_weight is not None:
            torch.mm(grad_logits, x_wide, out=grad_weight)

    return call


def floor_fp32(p: Problem) -> Callable[[], None]:
    """The floor's products in float32: the bound of bf16 on a CPU without bf16 instructions."""
    wide = p._replace(dtype="fp32", hidden=p.hidden.float(), weight=p.weight.float())
    return floor(wide)


PEERS = {"ours": ours, "trl": trl, "eager": eager, "floor": floor, "floor_fp32": floor_fp32}
FLOORS = ("floor", "floor_fp32")  # nothing to verify


def peers_of(dtype: str) -> list[str]:
    return [name for name in PEERS if not (name == "floor_fp32" and dtype == "fp32")]


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
