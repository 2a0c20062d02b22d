"""Fill a store: find what is missing, score this process's share of it, append, sync.

Each process writes a log of its own and takes its share of the batches, which all processes plan
alike from the whole data set; none waits for another. A batch of which a part is missing is scored
whole, in the composition that every run gives it, so that a run that was killed and started again
ends with the bits of one that was not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fusedpo._packing.names import takes_packed_rows
from fusedpo._store_keys import native
from fusedpo.store import RefStore

from .records import Batch, Record, RecordIndex, Source, plan_batches, tokens_of
from .scoring import score, scoring_mode, sums

SYNC_SECONDS = 1.0  # what a kill can cost, beside the batch in flight


@dataclass(frozen=True)
class SampleCheck:
    """Records scored again, one by one, by all processes; differences to the store in nats."""

    records: int
    largest_difference: float
    largest_relative_difference: float
    disagreeing: int  # records that differ by more than the store's tolerance


@dataclass(frozen=True)
class PrecomputeReport:
    """What was found and done."""

    store: str
    rows: int  # of the data set
    records: int  # distinct (prompt, completion) of the data set, for all processes
    without_tokens: int  # completions of which truncation left nothing to score
    found: int  # records that were there before, for all processes
    scored: int  # by this process
    tokens: int  # prompt and completion tokens that this process scored
    computed: int  # tokens that the model computed for them
    # Tokens that it would have computed in padded batches. A rank's share of these holds other
    # records than its share of packed ones: only sums over all ranks compare.
    padded: int
    seconds: float  # of scoring, without loading and tokenising
    rank: int
    world_size: int
    sample: SampleCheck | None = None
    not_shared: str | None = None  # why prompts were not computed once, where that was asked for

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def combined(samples: Sequence[SampleCheck]) -> SampleCheck:
    """What several processes found, as one."""
    return SampleCheck(
        sum(each.records for each in samples),
        max(each.largest_difference for each in samples),
        max(each.largest_relative_difference for each in samples),
        sum(each.disagreeing for each in samples),
    )


class Progress:
    """Told how far a run is; this one passes nothing on."""

    def start(self, found: int, records: int, tokens: int) -> None:
        """Before the first batch; `tokens` is what this process will score."""

    def advance(self, tokens: int) -> None:
        """After each batch."""

    def close(self) -> None:
        """At the end, also after an error."""


@dataclass(frozen=True)
class Scorer:
    """A reference model with the fused head, and how it is to be run."""

    model: Any
    autocast: torch.dtype | None
    pad_token_id: int
    inference_mode: bool

    def mode(self) -> contextlib.AbstractContextManager[None]:
        return scoring_mode(self.model, self.autocast, inference_mode=self.inference_mode)

    def __call__(self, records: Sequence[Record]) -> list[NDArray[np.float32]]:
        """Return the log-probs of each record's tokens; call within `mode()`."""
        return score(self.model, records, self.pad_token_id)


def open_store(path: str, identity: Mapping[str, Any]) -> RefStore:
    """Open the store at `path` for appending, or make one.

    Raises:
        StoreError: it belongs to another reference (the message names what differs), or it cannot
            be read or written.
    """
    return RefStore(path, "a", identity=dict(identity), tolerance=_tolerance(identity["scoring"]))


def _tolerance(scoring: Mapping[str, Any]) -> float:
    """How far two scorings of one completion in different batches may be apart, relative to the sum
    of its log-probs, or to 32 nats where that is less: two processes that meet the same record need
    not agree to the bit.

    In fp32 it follows from what is promised: both are within 8 eps (sum |logp_t| + max |z|) of the
    exact value, so within twice that of each other: at most 16 eps (1 + 50 / 32) of that, with
    logits up to 50. For bf16 and fp16 it is at least twice the largest difference measured
    (docs/precompute.md).
    """
    precision = {scoring["autocast"] or scoring["dtype"], scoring["dtype"]}
    if "bfloat16" in precision:
        return 1e-2
    return 2.5e-3 if "float16" in precision else 5e-6


def fill(
    store: RefStore,
    path: str,
    source: Source,
    index: RecordIndex,
    scorer: Scorer,
    *,
    max_tokens: int,
    per_token: bool,
    rank: int,
    world_size: int,
    verify_sample: int = 0,
    progress: Progress | None = None,
) -> PrecomputeReport:
    """Score what `store` lacks of `index`, as rank `rank` of `world_size`."""
    progress = progress or Progress()
    missing = store.missing(index.keys, tokens=per_token)
    packed = takes_packed_rows(scorer.model)

    def own(*, packed: bool) -> list[Batch]:
        plan = plan_batches(index, max_tokens, packed=packed)
        return [batch for batch in plan if batch.slot % world_size == rank]

    def incomplete(batches: Sequence[Batch]) -> list[Batch]:
        return [batch for batch in batches if missing[batch.members].any()]

    share = own(packed=packed)
    todo = incomplete(share)
    computed = sum(tokens_of(index, batch.members, packed=packed) for batch in todo)
    # Within the same budget padded batches would hold other records, nearer in length.
    padded = computed
    if packed and todo:
        instead = incomplete(own(packed=False))
        padded = sum(tokens_of(index, batch.members, packed=False) for batch in instead)
    tokens = [int(index.length[batch.members].sum()) for batch in todo]
    scored, start = 0, time.monotonic()
    progress.start(int((~missing).sum()), len(index), sum(tokens))
    try:
        with scorer.mode():
            if todo:
                with store.writer() as writer:
                    synced = start
                    for batch, size in zip(todo, tokens, strict=True):
                        scored += _score_batch(
                            writer, source, index, missing, batch, scorer, per_token
                        )
                        if time.monotonic() - synced >= SYNC_SECONDS:
                            writer.sync()
                            synced = time.monotonic()
                        progress.advance(size)
            seconds = time.monotonic() - start
            store.refresh()
            sample = None
            if verify_sample:
                sample = _verify(store, source, index, share, scorer, verify_sample)
    finally:
        progress.close()
    return PrecomputeReport(
        store=path,
        rows=index.rows,
        records=len(index),
        without_tokens=index.without_tokens,
        found=int((~missing).sum()),
        scored=scored,
        tokens=sum(tokens),
        computed=computed,
        padded=padded,
        seconds=seconds,
        rank=rank,
        world_size=world_size,
        sample=sample,
    )


def _score_batch(
    writer: Any,
    source: Source,
    index: RecordIndex,
    missing: NDArray[np.bool_],
    batch: Batch,
    scorer: Scorer,
    per_token: bool,
) -> int:
    records = fetch(source, index, batch.members)
    token_logps = scorer(records)
    new = np.flatnonzero(missing[batch.members])
    values = [token_logps[i] for i in new]
    writer.append(
        index.keys[batch.members[new]],
        sums(values),
        np.array([len(each) for each in values], np.uint32),
        token_logps=values if per_token else None,
    )
    return len(new)


def fetch(source: Source, index: RecordIndex, members: NDArray[np.int64]) -> list[Record]:
    """Read the token ids of records of an index."""
    numbers = index.record[members]
    rows, position = np.unique(numbers // source.per_row, return_inverse=True)
    records = source.records([int(row) for row in rows])
    places = position * source.per_row + numbers % source.per_row
    return [records[place] for place in places]


def _verify(
    store: RefStore,
    source: Source,
    index: RecordIndex,
    share: Sequence[Batch],
    scorer: Scorer,
    count: int,
) -> SampleCheck:
    """Score those of `count` records that are of this process's share again, each one alone."""
    # All processes draw the same.
    drawn = np.random.default_rng(0).choice(len(index), min(count, len(index)), replace=False)
    mine = np.concatenate([batch.members for batch in share]) if share else np.zeros(0, int)
    chosen = np.intersect1d(drawn, mine)
    again = np.array([sums(scorer([record]))[0] for record in fetch(source, index, chosen)])
    _, stored, _ = store.lookup(index.keys[chosen])
    difference = np.abs(again - stored)
    relative = difference / np.maximum(np.abs(stored), 1e-12)
    agree = native().agree
    agreeing = [agree(*pair, store.tolerance) for pair in zip(again, stored, strict=True)]
    return SampleCheck(
        len(chosen),
        float(difference.max(initial=0)),
        float(relative.max(initial=0)),
        agreeing.count(False),
    )
