"""The segments of one packed forward, and what follows from them alone.

Masks, and where the sequences of a variable-length call end, are the same for all layers of a kind:
the table is handed to every layer and builds each once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .layout import Segment

_CHOICES = ("segments", "varlen")

Problem = tuple[Tensor, Tensor, Tensor]  # queries, keys, values of one completion, [1, heads, L, d]


class SegmentTable:
    """The segments of one packed forward, for all its attention layers.

    Raises:
        ValueError: FUSEDPO_PACKED_ATTENTION names no way to attend.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self.calls = 0  # layers that have read the table
        self.windowed = 0  # of them, those that told it a window
        self.at_once = 0  # of them, those that made one variable-length call
        self.may_be_at_once = _choice() == "varlen"
        self.pieces = [
            length
            for _, prompt, (first, *others) in segments
            for length in (prompt + first, *others)
        ]
        # Of each problem, the numbers of queries and of keys; a further completion has no queries
        # of the prompt, but its keys.
        self.lengths: list[tuple[int, int]] = []
        for _, prompt, (first, *others) in segments:
            own = [(prompt + first, prompt + first), *((n, prompt + n) for n in others)]
            self.lengths += [each for each in own if each[0]]
        self._masks: dict[Any, Tensor] = {}
        self._ends: dict[torch.device, Tensor] = {}

    def problems(self, query: Tensor, key: Tensor, value: Tensor) -> list[Problem]:
        """Cut a row into the causal problems of its completions; together their queries are it."""
        return [each for each in self._problems(query, key, value) if each[0].shape[2]]

    def _problems(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Problem]:
        # Split, not sliced: the gradient of a split is one concatenation, that of each slice a row
        # of zeros.
        queries, keys, values = (iter(torch.split(t, self.pieces, 2)) for t in (query, key, value))
        for _, prompt, (_, *others) in self.segments:
            first_key, first_value = next(keys), next(values)
            yield next(queries), first_key, first_value
            for _ in others:
                yield (
                    next(queries),
                    torch.cat([first_key[:, :, :prompt], next(keys)], 2),
                    torch.cat([first_value[:, :, :prompt], next(values)], 2),
                )

    def ends(self, device: torch.device) -> Tensor:
        """[2, problems + 1] int32: 0, and the sum of the queries, and of the keys, up to each."""
        if device not in self._ends:
            sums = np.cumsum([(0, 0), *self.lengths], 0, dtype=np.int32)
            ends = torch.from_numpy(np.ascontiguousarray(sums.T))
            # The host need not wait: a copy from memory that is not pinned has read all of it when
            # it returns.
            self._ends[device] = ends.to(device, non_blocking=True)
        return self._ends[device]

    def mask(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
        """What is added to the scores [queries, keys] of the last `queries` of `keys` tokens: 0
        where a key is seen, else -inf."""
        key = queries, keys, window, like.dtype, like.device
        if key not in self._masks:
            query_at = torch.arange(keys - queries, keys, device=like.device)[:, None]
            key_at = torch.arange(keys, device=like.device)[None]
            hidden = key_at > query_at
            if window is not None:
                hidden |= key_at <= query_at - window
            zeros = torch.zeros(queries, keys, dtype=like.dtype, device=like.device)
            self._masks[key] = zeros.masked_fill_(hidden, float("-inf"))
        return self._masks[key]


def _choice() -> str:
    choice = os.environ.get("FUSEDPO_PACKED_ATTENTION") or "varlen"
    if choice not in _CHOICES:
        raise ValueError(
            f"FUSEDPO_PACKED_ATTENTION must be {' or '.join(_CHOICES)}; got {choice!r}."
        )
    return choice
