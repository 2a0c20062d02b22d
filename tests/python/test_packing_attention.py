"""Attention within segments against attention over the whole row with a mask, in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="packed attention is registered with transformers")

from fusedpo._packing import attention, varlen
from fusedpo._packing.attention import attend_in_segments
from fusedpo._packing.layout import pack
from fusedpo._packing.table import SegmentTable
from packing_helpers import LENGTHS, make_groups, visible, whole_row
from torch import Tensor

HEADS, SIZE = 4, 8


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
    want = whole_row(q, k, v, visible(LENGTHS, window), 0.7, softcap, sinks)
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


@pytest.mark.parametrize(
    ("device", "dtype", "flash", "repeated"),
    [
        ("cuda", torch.bfloat16, True, False),
        ("cuda", torch.bfloat16, False, True),  # before Ampere
        ("cuda", torch.float32, True, True),
        ("mps", torch.float32, False, True),
        ("cpu", torch.float32, False, False),
    ],
)
def test_key_heads_are_repeated_where_a_device_may_refuse_fewer(
    device: str, dtype: torch.dtype, flash: bool, repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's fused kernels but flash attention refuse them, and all scores would be formed."""
    key_heads = []

    def records(q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool, **_: Any) -> Tensor:
        assert k.shape == v.shape
        assert enable_gqa == (k.shape[1] != q.shape[1])
        key_heads.append(k.shape[1])
        return q

    monkeypatch.setattr(varlen, "has_flash", lambda device: flash)
    monkeypatch.setattr(F, "scaled_dot_product_attention", records)
    table = SegmentTable(pack(make_groups([(4, (3,))])).segments)
    q, k = (torch.zeros(1, heads, 7, SIZE, dtype=dtype) for heads in (4, 2))
    monkeypatch.setattr(torch.Tensor, "device", torch.device(device), raising=False)
    attention._fused(q, k, k, table, None, None)
    assert key_heads == [4 if repeated else 2]
