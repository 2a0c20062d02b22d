"""All completions of a packed row in one call of torch's variable-length flash attention.

Queries are the row itself, cut into (prompt + first completion) and the further completions; keys
and values are those of each, with its prompt. Flash attention aligns a causal mask at the end of
queries and keys, so that a completion's queries see its whole prompt.

It runs on CUDA, in half precision; a GPU is given one kernel for a layer, where
scaled_dot_product_attention would be one for each completion. Every kind of call is compared with
that once, when it is first made, and left alone from then on if they differ.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

# What `varlen_attn` takes (window_size, enable_gqa, scale) is known from this release on.
_SINCE = Version("2.13")
_LARGEST_HEAD = 256
_CHOICES = ("segments", "varlen")

Problem = tuple[Tensor, Tensor, Tensor]  # queries, keys, values of one completion, [1, heads, L, d]
_agrees: dict[tuple[Any, ...], bool] = {}  # by kind of call


def usable(query: Tensor, value: Tensor) -> bool:
    """Whether one variable-length call may serve: FUSEDPO_PACKED_ATTENTION=segments forbids it."""
    choice = os.environ.get("FUSEDPO_PACKED_ATTENTION") or "varlen"
    if choice not in _CHOICES:
        raise ValueError(
            f"FUSEDPO_PACKED_ATTENTION must be {' or '.join(_CHOICES)}; got {choice!r}."
        )
    size = query.shape[-1]
    return (
        choice == "varlen"
        and query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= _LARGEST_HEAD
        and Version(torch.__version__).release >= _SINCE.release
    )


def attend(problems: Sequence[Problem], scaling: float | None, window: int | None) -> Tensor:
    """Attend within every completion at once.

    Args:
        problems: as attention.py cuts a row; together their queries are the row.
        scaling: factor on the scores; by default 1 / sqrt(d).
        window: a token sees so many tokens, itself included.

    Returns:
        [1, N, heads, d].
    """
    from torch.nn.attention.varlen import varlen_attn

    def joined(which: int) -> Tensor:
        # [1, heads, L, d] of each -> [sum of L, heads, d]
        return torch.cat([problem[which] for problem in problems], 2)[0].transpose(0, 1)

    query, key, value = (joined(which).contiguous() for which in range(3))
    query_lengths = [q.shape[2] for q, _, _ in problems]
    key_lengths = [k.shape[2] for _, k, _ in problems]
    output: Any = varlen_attn(
        query,
        key,
        value,
        _ends(query_lengths, query.device),
        _ends(key_lengths, query.device),
        max(query_lengths),
        max(key_lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    row: Tensor = output[None]
    return row


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[len + 1] int32: 0, and the sum of the lengths up to each."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device, non_blocking=True)


def agrees(
    problems: Sequence[Problem],
    scaling: float | None,
    window: int | None,
    segments: Callable[[], Tensor],
) -> bool:
    """Whether `attend` gives what one call for each completion gives, to the dtype's rounding.

    Tried on the first row of every device, dtype, shape of heads and kind of window.
    """
    query, key, _ = problems[0]
    kind = (query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], window is None)
    if kind not in _agrees:
        with torch.no_grad():
            want = segments().float()
            difference = (attend(problems, scaling, window).float() - want).norm()
            # Both round to half precision: 2^-8 relative in bf16, sums of it in the softmax.
            _agrees[kind] = bool(difference <= 0.02 * want.norm())
        if not _agrees[kind]:
            warnings.warn(
                "fusedpo: torch's variable-length attention differs from "
                f"scaled_dot_product_attention by {float(difference / want.norm()):.1e} here "
                f"({query.dtype}, {query.shape[1]} heads of {query.shape[3]}, window {window}); "
                "packed rows run without it. Report your GPU and the version of torch.",
                stacklevel=2,
            )
    return _agrees[kind]
