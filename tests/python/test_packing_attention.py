"""Attention within segments against attention over the whole row with a mask, in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="packed attention is registered with transformers")

from fusedpo._packing.attention import SegmentTable, attend_in_segments
from fusedpo._packing.layout import pack
from packing_helpers import LENGTHS, make_groups
from torch import Tensor

HEADS, SIZE = 4, 8


def visible(window: int | None) -> Tensor:
    """Which of the row's tokens sees which, [N, N], written down token by token."""
    tokens = []  # group, completion (None: prompt), position
    for group, (prompt, completions) in enumerate(LENGTHS):
        tokens += [(group, None, i) for i in range(prompt)]
        for completion, length in enumerate(completions):
            tokens += [(group, completion, prompt + i) for i in range(length)]

    def sees(query: Any, key: Any) -> bool:
        same = query[0] == key[0] and key[1] in (None, query[1])
        near = window is None or query[2] - key[2] < window
        return bool(same and key[2] <= query[2] and near)

    rows = [[sees(query, key) for key in tokens] for query in tokens]
    return torch.tensor(rows)


def whole_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        extra = sinks.reshape(1, HEADS, 1, 1).expand(-1, -1, scores.shape[2], -1)
        scores = torch.cat([scores, extra], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize(
    ("key_heads", "window", "softcap", "with_sinks"),
    list(itertools.product((1, 2, 4), (None, 3), (None, 1.5), (False, True))),
)
def test_segments_attend_as_a_whole_row_with_a_mask(
    key_heads: int, window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    row = pack(make_groups())
    q = torch.randn(1, HEADS, row.tokens, SIZE, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(1, key_heads, row.tokens, SIZE, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True) if with_sinks else None
    inputs = [q, k, v] if sinks is None else [q, k, v, sinks]
    want = whole_row(q, k, v, visible(window), 0.7, softcap, sinks)
    got, weights = attend_in_segments(
        torch.nn.Identity(),
        q,
        k,
        v,
        SegmentTable(row.segments),
        scaling=0.7,
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks,
    )
    assert weights is None
    # Softmax of scores that are formed is in fp32, as in transformers.
    tolerance = 1e-12 if softcap is None and sinks is None else 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(want, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)


def test_dropout_is_refused() -> None:
    table = SegmentTable(pack(make_groups()).segments)
    q = torch.zeros(1, HEADS, 1, SIZE)
    with pytest.raises(ValueError, match=r"without dropout; Identity has 0\.1"):
        attend_in_segments(torch.nn.Identity(), q, q, q, table, dropout=0.1)
