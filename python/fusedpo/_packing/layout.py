"""One row instead of a padded batch: each prompt once, then its completions, and no padding.

A preference pair becomes `prompt | chosen | rejected`. Positions of every completion go on from the
prompt, and the first token of every completion is scored from the prompt's last hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]


class Group(NamedTuple):
    """Completions of one prompt, in token ids; the prompt may be empty, and so may a completion.

    `start` is the position of the first token: 0, but for batches that were padded on the left.
    """

    prompt: Ids
    completions: Sequence[Ids]
    start: int = 0


class Segment(NamedTuple):
    """Where a group lies in the row: `prompt` tokens from `offset`, then completions of these
    lengths."""

    offset: int
    prompt: int
    completions: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """N tokens of several groups in one row, and which of its hidden states score the S tokens.

    Scored are all tokens of the completions, in the order of the groups and of their completions;
    with an empty prompt not the first one, which nothing precedes. Segments and counts are Python
    numbers, so that the host never waits for a device to learn the layout.
    """

    input_ids: Tensor  # [1, N]
    position_ids: Tensor  # [1, N]
    rows: Tensor  # [S] of the N hidden states, in the order of the scored tokens
    labels: Tensor  # [S]
    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        """N, what the backbone computes."""
        return self.input_ids.shape[1]

    @property
    def counts(self) -> list[int]:
        """Scored tokens of each completion, in order; their sum is S."""
        return [
            length if segment.prompt else max(length - 1, 0)
            for segment in self.segments
            for length in segment.completions
        ]

    def repeated(self) -> Tensor:
        """The row's tokens as padded rows would hold them: each prompt once for each completion.

        Indices into the row, on the CPU. What averages over tokens (the router loss of a mixture
        of experts) weights them so.
        """
        pieces = [np.zeros(0, np.int64)]
        for offset, prompt, completions in self.segments:
            first = offset + prompt
            for length in completions:
                pieces += [np.arange(offset, offset + prompt), np.arange(first, first + length)]
                first += length
        return torch.from_numpy(np.concatenate(pieces))

    def to(self, device: Any, non_blocking: bool = False) -> Packed:
        """Move the tensors; accelerate calls this on what it finds in a batch."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Packed:
        """Pin the tensors; a DataLoader calls this on what it finds in a batch."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> Packed:
        return replace(
            self,
            input_ids=change(self.input_ids),
            position_ids=change(self.position_ids),
            rows=change(self.rows),
            labels=change(self.labels),
        )


def pack(groups: Sequence[Group]) -> Packed:
    """Arrange groups in one row.

    Raises:
        ValueError: no token in any group.
    """
    ids: list[Ids] = []
    positions: list[Ids] = []
    rows: list[Ids] = [np.zeros(0, np.int64)]
    labels: list[Ids] = [np.zeros(0, np.int64)]
    segments: list[Segment] = []
    offset = 0
    for prompt, completions, start in groups:
        lengths = tuple(len(completion) for completion in completions)
        segments.append(Segment(offset, len(prompt), lengths))
        ids.append(prompt)
        positions.append(np.arange(start, start + len(prompt)))
        first = offset + len(prompt)
        for completion in completions:
            ids.append(completion)
            end = start + len(prompt) + len(completion)
            positions.append(np.arange(start + len(prompt), end))
            # A token is scored by the one before it: the first by the prompt's last.
            before = np.arange(first - 1, first + len(completion) - 1)
            if len(completion):
                before[0] = offset + len(prompt) - 1
            scored = slice(0 if len(prompt) else 1, None)
            rows.append(before[scored])
            labels.append(completion[scored])
            first += len(completion)
        offset = first
    if not offset:
        raise ValueError("a packed batch must have at least one token; got none.")

    def joined(pieces: list[Ids]) -> Tensor:
        return torch.from_numpy(np.concatenate(pieces).astype(np.int64, copy=False))

    return Packed(
        input_ids=joined(ids)[None],
        position_ids=joined(positions)[None],
        rows=joined(rows),
        labels=joined(labels),
        segments=tuple(segments),
    )
