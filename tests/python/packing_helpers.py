"""Groups of random tokens, the two layouts of them (padded rows, and one packed row), and attention
over a packed row as it is defined, and as a kernel would compute it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fusedpo._packing.layout import Group, pack
from torch import Tensor

VOCABULARY = 96
# Prompt and completions; among them an empty prompt, empty completions, single tokens.
LENGTHS = ((7, (9, 4)), (0, (6, 1)), (1, (0, 12)), (12, (1,)), (5, (3, 3, 8)), (0, (0, 5)))


def make_groups(lengths: Any = LENGTHS, seed: int = 0) -> list[Group]:
    numbers = np.random.default_rng(seed)

    def tokens(count: int) -> Any:
        return numbers.integers(5, VOCABULARY, count)

    return [Group(tokens(p), [tokens(c) for c in completions]) for p, completions in lengths]


def padded(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Every completion as a row of its own, with its prompt, padded on the right."""
    rows = [(prompt, each) for prompt, completions, _ in groups for each in completions]
    shape = len(rows), max(2, *(len(prompt) + len(each) for prompt, each in rows))
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, -100),
    }
    for i, (prompt, each) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(each)
        batch["input_ids"][i, :end] = torch.from_numpy(np.concatenate([prompt, each]))
        batch["attention_mask"][i, :end] = 1
        batch["labels"][i, start:end] = batch["input_ids"][i, start:end]
    return batch


def padded_logps(model: Any, groups: Sequence[Group], **options: Any) -> list[Tensor]:
    """Log-probs of the tokens of each completion, from padded rows."""
    batch = padded(groups)
    log_probs = model(**batch, fused_lm_head=True, **options).log_probs
    return [row[mask] for row, mask in zip(log_probs, batch["labels"][:, 1:] != -100, strict=True)]


def packed_logps(model: Any, groups: Sequence[Group], **options: Any) -> list[Tensor]:
    """The same from one packed row."""
    row = pack(groups)
    output = model(packed=row, fused_lm_head=True, **options)
    return list(output.log_probs.split(row.counts))


def summed(token_logps: Sequence[Tensor]) -> Tensor:
    """Log-probs of completions in float64, [completions]."""
    return torch.stack([each.double().sum() for each in token_logps])


def backward(token_logps: Sequence[Tensor], model: Any) -> dict[str, Tensor]:
    """The gradients of a weighted sum of sequence log-probs, by parameter."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(len(token_logps), generator=generator, dtype=torch.float64)
    model.zero_grad()
    (summed(token_logps) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Each parameter's gradient is right to 1e-5 of its own norm, and 1e-6 of the largest norm.

    Without the second part a gradient that is a small rest of large terms, or 0 but for rounding
    (that of a key's bias: a softmax does not see it), could not be compared: it is rounded as its
    terms are, which are as large as the other parameters' gradients. 1e-6 is 8 eps of float32.
    """
    assert got.keys() == want.keys()
    norms = {name: float(gradient.double().norm()) for name, gradient in want.items()}
    largest = max(norms.values())
    for name, norm in norms.items():
        off = float((got[name] - want[name]).double().norm())
        limit = 1e-5 * norm + 1e-6 * largest
        assert off <= limit, f"{name} is off by {off:.2e}; its norm is {norm:.2e} of {largest:.2e}"


def relative_difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    squares = [((got[name] - want[name]).double() ** 2).sum() for name in want]
    norms = [(each.double() ** 2).sum() for each in want.values()]
    return float((sum(squares) / sum(norms)) ** 0.5)


def visible(lengths: Any, window: int | None) -> Tensor:
    """Which of the row's tokens sees which, [N, N], written down token by token."""
    tokens = []  # group, completion (None: prompt), position
    for group, (prompt, completions) in enumerate(lengths):
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
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        extra = sinks.reshape(1, -1, 1, 1).expand(-1, -1, scores.shape[2], -1)
        scores = torch.cat([scores, extra], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
    from_start: bool = False,
) -> Tensor:
    """What torch documents of `varlen_attn`, which has no CPU kernel, written down plainly."""
    assert query.dtype == key.dtype == value.dtype
    assert {t.dtype for t in (cu_seq_q, cu_seq_k)} == {torch.int32}
    assert all(t.is_contiguous() for t in (query, key, value, cu_seq_q, cu_seq_k))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    query_lengths, key_lengths = (cu.diff().tolist() for cu in (cu_seq_q, cu_seq_k))
    assert (max(query_lengths), max(key_lengths)) == (max_q, max_k)
    # A kernel rounds its inputs and outputs, not what is between.
    inner = torch.promote_types(query.dtype, torch.float32)
    splits = (
        query.to(inner).split(query_lengths),
        key.to(inner).split(key_lengths),
        value.to(inner).split(key_lengths),
    )
    outputs = []
    scale = query.shape[2] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        for q, k, v in zip(*splits, strict=True):
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            first = 0 if from_start else len(k) - len(q)
            back = torch.arange(first, first + len(q))[:, None] - torch.arange(len(k))[None]
            left, right = window_size
            seen = back >= -right
            if left >= 0:
                seen &= back <= left
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs).to(query.dtype)
