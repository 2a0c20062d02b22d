"""Attention within segments against attention over the whole row with a mask, in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="packed attention is registered with transformers")

from fusedpo._packing import varlen
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


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch documents of `varlen_attn`, which has no CPU kernel, written down plainly."""
    assert {t.dtype for t in (cu_seq_q, cu_seq_k)} == {torch.int32}
    assert query.is_contiguous()
    assert key.is_contiguous()
    assert value.is_contiguous()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    lengths = [cu.diff().tolist() for cu in (cu_seq_q, cu_seq_k)]
    assert [max(each) for each in lengths] == [max_q, max_k]
    splits = (query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]))
    for q, k, v in zip(*splits, strict=True):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        back = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))[None]
        left, right = window_size
        seen = back >= -right
        if left >= 0:
            seen &= back <= left
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


@pytest.mark.parametrize(("key_heads", "window"), list(itertools.product((1, 2, 4), (None, 1, 3))))
def test_one_call_of_variable_length_attention_attends_as_a_whole_row(
    key_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    monkeypatch.setattr(varlen, "usable", lambda *_: True)
    monkeypatch.setattr(varlen, "_agrees", {})
    row = pack(make_groups())
    shapes = [(1, heads, row.tokens, SIZE) for heads in (HEADS, key_heads, key_heads)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    want = whole_row(*inputs, visible(window), 0.7, None, None)
    got, _ = attend_in_segments(
        torch.nn.Identity(), *inputs, SegmentTable(row.segments), scaling=0.7, sliding_window=window
    )
    assert list(varlen._agrees.values()) == [True]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(want, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


def test_variable_length_attention_that_differs_is_told_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def aligned_at_the_start(*arguments: Any, window_size: Any, **keywords: Any) -> Tensor:
        return plain_varlen(*arguments, window_size=(-1, -1000), **keywords).nan_to_num(0.0)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", aligned_at_the_start)
    monkeypatch.setattr(varlen, "usable", lambda *_: True)
    monkeypatch.setattr(varlen, "_agrees", {})
    row = pack(make_groups())
    q, k, v = torch.randn(3, 1, HEADS, row.tokens, SIZE).unbind()
    table = SegmentTable(row.segments)
    want = whole_row(q, k, v, visible(None), 0.7, None, None)
    with pytest.warns(UserWarning, match="variable-length attention differs"):
        got, _ = attend_in_segments(torch.nn.Identity(), q, k, v, table, scaling=0.7)
    torch.testing.assert_close(got, want)
    again, _ = attend_in_segments(torch.nn.Identity(), q, k, v, table, scaling=0.7)  # no warning
    assert torch.equal(again, got)


def test_choice_of_attention_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.zeros(1, HEADS, 1, SIZE, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"), raising=False)
    assert varlen.usable(half, half)
    assert not varlen.usable(half.float(), half.float())
    monkeypatch.setenv("FUSEDPO_PACKED_ATTENTION", "segments")
    assert not varlen.usable(half, half)
    monkeypatch.setenv("FUSEDPO_PACKED_ATTENTION", "flash")
    with pytest.raises(ValueError, match="must be segments or varlen; got 'flash'"):
        varlen.usable(half, half)
