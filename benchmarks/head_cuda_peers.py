"""The problems of the head benchmark on a GPU, and its contestants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks import head_peers, head_scalar_peers
from benchmarks.head_problem import IGNORE, Problem


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


PEERS: dict[str, Callable[[Problem], Callable[[], Any]]] = {
    "floor": head_peers.floor,
    "ours": head_peers.ours,
    "trl": head_peers.trl,
    "eager": head_peers.eager,
    "compile": head_peers.compiled,
    **head_scalar_peers.PEERS,
}
