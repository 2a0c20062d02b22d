"""The contestants of the head benchmark.

A peer maps a problem to a function without arguments that runs forward (and backward) and returns
an Answer; a floor's function returns nothing, and there is nothing to verify.
"""

from __future__ import annotations

from collections.abc import Callable

import fusedpo
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.head_problem import METRICS, Answer, Problem


def answer(p: Problem, outputs: dict[str, Tensor], logps: Tensor, upstream: Tensor) -> Answer:
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
        return answer(p, outputs, out.logps, p.upstream)

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
        return answer(p, outputs, logps, p.upstream)

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
        return answer(p, {"logps": logps.detach()}, logps, p.upstream[p.mask])

    return call


def compiled(p: Problem) -> Callable[[], Answer]:
    """torch.compile of the eager expression, on completion rows picked before."""

    def logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = hidden @ weight.T
        if p.softcap is not None:
            logits = p.softcap * torch.tanh(logits / p.softcap)
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    if p.dtype != "fp32" and p.hidden.device.type == "cpu" and not common.has_bf16_products():
        raise RuntimeError("without bf16 instructions its bf16 products take minutes")
    torch._dynamo.reset()
    function = torch.compile(logps_of, fullgraph=True, dynamic=False)

    def call() -> Answer:
        with p.autocast():
            logps = function(p.hidden[p.mask], p.weight, p.labels[p.mask])
        outputs = {"logps": logps.detach()}
        return answer(p, outputs, logps, p.upstream[p.mask])

    return call


def torch_chunked(p: Problem) -> Callable[[], Answer]:
    """torch's own chunked linear_cross_entropy (2.13) on the completion rows, per token: a loss
    needs log-probs before it has a gradient."""
    options = torch.nn.LinearCrossEntropyOptions()

    def call() -> Answer:
        with p.autocast():
            logps = -torch.nn.functional.linear_cross_entropy(
                p.hidden[p.mask], p.weight, p.labels[p.mask], reduction="none", options=options
            )
        return answer(p, {"logps": logps.detach()}, logps, p.upstream[p.mask])

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


def cast_weight(p: Problem) -> Callable[[], None]:
    """The weight rounded to the autocast dtype, into a buffer that exists: what must be added to
    the floor under autocast."""
    rounded = torch.empty_like(p.weight, dtype=torch.bfloat16, requires_grad=False)
    weight = p.weight.detach()

    def call() -> None:
        rounded.copy_(weight)

    return call
