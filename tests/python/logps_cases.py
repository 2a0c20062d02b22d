"""Inputs and tools that the log-prob tests share; logits are peaked like a language model's."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from fusedpo import _load
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
METRICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
IGNORE = -100

NATIVE = _load.native("cpu")
needs_native = pytest.mark.skipif(
    not NATIVE, reason=f"tests the C++ operators, and they are not loaded: {_load.why_not('cpu')}"
)
if not NATIVE:
    # The one warning of the process is spent here; it has tests in processes of its own.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _load.warn_fallback("cpu")


class Head(NamedTuple):
    """One call of linear_token_logps."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]
    bias: Tensor | None  # [V]
    lora: tuple[Tensor, Tensor, float] | None  # A [r, H], B [V, r], scale


def generator(seed: int) -> torch.Generator:
    """Draws on the default device, which the GPU test group sets (cuda_cases.py)."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def autocast(dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> torch.autocast:
    return torch.autocast(torch.get_default_device().type, dtype=dtype, enabled=enabled)


def make_logits(
    rows: int, vocabulary: int, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[N, V]: a bulk with a spread of 2.5 nats and up to four candidates 5 to 20 nats above it."""
    g = generator(seed)
    logits = 2.5 * torch.randn(rows, vocabulary, generator=g)
    winners = torch.randint(vocabulary, (rows, min(4, vocabulary)), generator=g)
    return logits.scatter_add(1, winners, 5 + 15 * torch.rand(winners.shape, generator=g)).to(dtype)


def make_labels(rows: int, vocabulary: int, seed: int, ignored: float = 0.0) -> Tensor:
    g = generator(seed + 1_000_003)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    return labels.masked_fill(torch.rand(rows, generator=g) < ignored, IGNORE)


def make_head(
    rows: int,
    size: int,
    vocabulary: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    rank: int = 0,
    ignored: float = 0.0,
) -> Head:
    """Hidden states that lean towards one row of the weight each, so that the logits are peaked."""
    g = generator(seed)
    weight = torch.randn(vocabulary, size, generator=g) * 2.5 / size**0.5
    favourite = torch.randint(vocabulary, (rows,), generator=g)
    hidden = torch.randn(rows, size, generator=g) + 1.5 * weight[favourite]
    lora = None
    if rank:
        lora_a = torch.randn(rank, size, generator=g) / size**0.5
        lora_b = torch.randn(vocabulary, rank, generator=g)
        lora = (lora_a.to(dtype), lora_b.to(dtype), 0.5)
    return Head(
        hidden.to(dtype),
        weight.to(dtype),
        make_labels(rows, vocabulary, seed, ignored),
        torch.randn(vocabulary, generator=g).to(dtype) if bias else None,
        lora,
    )


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal dtype, shape and value everywhere, with NaN equal to NaN."""
    if a is None or b is None:
        return a is b
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))
    )


def assert_same_bits(ours: tuple, theirs: tuple) -> None:
    """Compares two TokenLogps, or two tuples of tensors, bit for bit."""
    assert len(ours) == len(theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert same_bits(a, b), f"entry {index}: {a} is not {b}"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_python(code: str, **environment: str) -> str:
    """Runs `code` in a new process, with this directory importable, and returns what it printed."""
    path = os.pathsep.join(
        [os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    return result.stdout
