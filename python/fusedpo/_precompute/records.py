"""What is to be scored: (prompt, completion) token ids, their keys, and the batches they form.

Batches are planned from the whole data set, whatever a store holds already and however the rows are
ordered. So a run that was interrupted scores the same batches as one that was not, and gets the
same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fusedpo._store_columns import num_scored
from fusedpo.store import record_keys

_CHUNK_ROWS = 1024
Ids = NDArray[np.int64]


class Record(NamedTuple):
    """Token ids of a prompt and of a completion, as they are scored: truncated, without padding."""

    prompt: Ids
    completion: Ids

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def num_tokens(self) -> int:
        """Tokens that get a log-prob."""
        return num_scored(self.prompt, self.completion)


class Source(Protocol):
    """A data set seen as records; row r holds the records r * per_row ... (r + 1) * per_row - 1."""

    per_row: int

    def __len__(self) -> int:
        """Number of rows."""

    def records(self, rows: Sequence[int]) -> list[Record]:
        """Return the records of these rows, row after row."""


def keys_of(records: Sequence[Record]) -> NDArray[np.uint8]:
    """Return the store's keys, uint8 [N, 16]."""
    if not records:
        return np.zeros((0, 16), np.uint8)
    keys: NDArray[np.uint8] = record_keys(
        _flat([record.prompt for record in records]),
        _flat([record.completion for record in records]),
    )
    return keys


def _flat(lists: Sequence[Ids]) -> tuple[Ids, NDArray[np.int64]]:
    """All ids one after another, and the N + 1 offsets that cut them."""
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    return np.concatenate(lists), offsets


@dataclass(frozen=True)
class RecordIndex:
    """Every record of a source once, sorted by key; those without a token to score are left out."""

    keys: NDArray[np.uint8]  # [N, 16]
    record: NDArray[np.int64]  # [N] number of the record in the source
    length: NDArray[np.int64]  # [N] tokens of prompt and completion
    prompt: NDArray[np.int64]  # [N] tokens of the prompt
    group: NDArray[np.void]  # [N] digest of the prompt: equal for the completions of a row
    rows: int
    without_tokens: int  # records of the source that have nothing to score

    def __len__(self) -> int:
        return len(self.keys)


def index_records(
    source: Source, progress: Callable[[int], object] = lambda rows: None
) -> RecordIndex:
    """Read the whole source once; ids are not kept. `progress` is told rows as they are read."""
    keys, groups, lengths, prompts, numbers = [], [], [], [], []
    without = 0
    for start in range(0, len(source), _CHUNK_ROWS):
        rows = range(start, min(start + _CHUNK_ROWS, len(source)))
        records = source.records(rows)
        kept = [i for i, record in enumerate(records) if record.num_tokens]
        without += len(records) - len(kept)
        keys.append(keys_of([records[i] for i in kept]))
        # keep_end truncation may cut the prompts of a pair differently: the row's first one counts.
        groups += [_digest(records[i - i % source.per_row].prompt) for i in kept]
        lengths += [records[i].length for i in kept]
        prompts += [len(records[i].prompt) for i in kept]
        numbers += [start * source.per_row + i for i in kept]
        progress(len(rows))
    all_keys = np.concatenate(keys) if keys else np.zeros((0, 16), np.uint8)
    group = np.array(groups, dtype="V16")
    # By key, then by group, so that the order of the rows decides nothing.
    order = np.lexsort((_as_numbers(group)[:, 1], _as_numbers(group)[:, 0], *_columns(all_keys)))
    sorted_keys = _as_void(all_keys)[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = sorted_keys[1:] != sorted_keys[:-1]
    chosen = order[first]
    return RecordIndex(
        keys=all_keys[chosen],
        record=np.array(numbers, np.int64)[chosen],
        length=np.array(lengths, np.int64)[chosen],
        prompt=np.array(prompts, np.int64)[chosen],
        group=group[chosen],
        rows=len(source),
        without_tokens=without,
    )


@dataclass(frozen=True)
class Batch:
    """Records that are scored together, as positions in a RecordIndex, and the rank that does it
    (modulo the number of ranks)."""

    members: NDArray[np.int64]
    slot: int


def tokens_of(index: RecordIndex, members: Any, *, packed: bool) -> int:
    """Tokens that a model computes for records: padded to the longest, or packed in one row, where
    a prompt counts once.

    Within a group prompts of one length are one prompt; keep_end may cut it to several lengths.
    """
    lengths = index.length[members]
    if not packed:
        return int(lengths.max(initial=0)) * len(lengths)
    prompts = index.prompt[members]
    groups = _as_numbers(index.group[members])
    once = np.unique(np.column_stack([groups, prompts.astype(np.uint64)]), axis=0)[:, 2]
    return int((lengths - prompts).sum()) + int(once.sum())


def plan_batches(index: RecordIndex, max_tokens: int, *, packed: bool = False) -> list[Batch]:
    """Cut the records into batches of at most `max_tokens`, longest first.

    What counts is what a model computes: with padding, or of packed rows. Completions of one prompt
    stay together: in one batch, or, if there are too many, in batches of the same rank. A record
    longer than `max_tokens` is a batch of its own.
    """
    lengths, prompts = index.length.tolist(), index.prompt.tolist()
    batches: list[Batch] = []
    batch: list[int] = []
    longest = used = slot = 0

    def close() -> None:
        nonlocal batch, used, slot
        if batch:
            batches.append(Batch(np.array(batch, np.int64), slot))
            batch, used, slot = [], 0, slot + 1

    def cut(members: list[int]) -> list[tuple[list[int], int]]:
        """A group in pieces of at most `max_tokens`, and the tokens of each."""
        pieces: list[tuple[list[int], int]] = []
        piece: list[int] = []
        tokens = 0
        seen: set[int] = set()  # lengths of the prompts of the piece
        for member in members:
            prompt = prompts[member]
            again = prompt if prompt in seen else 0
            # Padded: the batch's first group has the longest record.
            added = lengths[member] - again if packed else longest
            if piece and tokens + added > max_tokens:
                pieces.append((piece, tokens))
                piece, tokens, seen = [], 0, set()
                added = lengths[member] if packed else longest
            piece.append(member)
            tokens += added
            seen.add(prompt)
        return [*pieces, (piece, tokens)]

    for members in _groups_longest_first(index):
        pieces = cut(members)
        if batch and (len(pieces) > 1 or used + pieces[0][1] > max_tokens):
            close()
        if not batch:
            longest = lengths[members[0]]
            *whole, last = cut(members)
            batches += [Batch(np.array(piece, np.int64), slot) for piece, _ in whole]
            pieces = [last]
        batch += pieces[0][0]
        used += pieces[0][1]
    close()
    return batches


def _groups_longest_first(index: RecordIndex) -> Iterator[list[int]]:
    """Positions of the records of each prompt, longest record first; ties are broken by content."""
    group = _as_numbers(index.group)
    # Positions are in the order of the keys, and lexsort is stable.
    order = np.lexsort((-index.length, group[:, 1], group[:, 0]))
    same = (index.group[order][1:] == index.group[order][:-1]) if len(order) else np.zeros(0, bool)
    starts = np.flatnonzero(np.concatenate(([True], ~same))) if len(order) else np.zeros(0, int)
    groups = np.split(order, starts[1:])
    if not len(order):
        return
    longest = np.array([index.length[members[0]] for members in groups])
    for i in np.argsort(-longest, kind="stable"):
        yield [int(member) for member in groups[i]]


def _digest(ids: Ids) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids, "<i8").tobytes(), digest_size=16).digest()


def _as_void(keys: NDArray[np.uint8]) -> NDArray[np.void]:
    return np.ascontiguousarray(keys).view("V16").reshape(-1)


def _as_numbers(groups: NDArray[np.void]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(groups).view(">u8").reshape(-1, 2)


def _columns(keys: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """What lexsort needs to sort by key: the last column given counts most."""
    halves = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2)
    return halves[:, 1], halves[:, 0]
