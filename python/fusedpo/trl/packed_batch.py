"""A batch of pairs as one packed row, which stays with TRL's padded batch until the model runs.

TRL's collator pads a batch of B pairs to [2B, T], every prompt twice. That batch stays as it is:
labels, masks, metrics and the reference store read it. Beside it the packed row is laid out, on the
CPU where the batch is collated. On its way to the model the batch is pickled by a worker, pinned
and moved to a device, and its tensors become others each time: `CollatedBatch` does that itself and
takes the row along. A row that is found beside tensors it was not made of is not used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedpo._head import FusedHeadOutput
from fusedpo._packing.layout import Group, Packed, pack

KEY = "packed_batch"
_IDS_AND_MASKS = ("input_ids", "attention_mask", "completion_mask")
# What a batch may hold besides token ids; more than this would have to be packed, too.
KNOWN = frozenset(
    {
        *_IDS_AND_MASKS,
        "ref_chosen_logps",
        "ref_rejected_logps",
        "use_cache",
        KEY,
    }
)


class NotShareableError(ValueError):
    """A batch that cannot be packed; the message says why."""


@dataclass(frozen=True)
class PackedBatch:
    """A batch of pairs as one row, and where the results of its scored tokens belong."""

    packed: Packed
    places: Tensor  # [S] indices into [2B * (T - 1)]
    shape: tuple[int, int]  # 2B, T
    # The tensors that it was made of, and their versions. Held, not named by their address: that of
    # a tensor that is gone may be given to the next.
    source: tuple[tuple[Tensor, int], ...]

    def is_of(self, inputs: Mapping[str, Any]) -> bool:
        """Whether it was made of these tensors, and they were not written to since."""
        return all(
            inputs.get(name) is tensor and _version(tensor) == version
            for name, (tensor, version) in zip(_IDS_AND_MASKS, self.source, strict=True)
        )

    def taken_to(self, inputs: Mapping[str, Any]) -> PackedBatch:
        """Return it as of the tensors that those of its source have become."""
        return replace(self, source=_source(inputs))

    def moved_to(self, inputs: Mapping[str, Any]) -> PackedBatch | None:
        """Return it as of these tensors if they are its source, moved to a device or not at all;
        None if they were written to, have another shape or dtype, or are others."""
        for name, (before, version) in zip(_IDS_AND_MASKS, self.source, strict=True):
            now = inputs[name]
            same = now is before and _version(now) == version
            moved = (
                now.device != before.device
                and now.shape == before.shape
                and now.dtype == before.dtype
            )
            if not (same or moved):
                return None
        return self.taken_to(inputs)

    def to(self, device: Any, non_blocking: bool = False) -> PackedBatch:
        """Move the tensors of the row."""
        return replace(
            self,
            packed=self.packed.to(device, non_blocking=non_blocking),
            places=self.places.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> PackedBatch:
        """Pin the tensors of the row."""
        return replace(self, packed=self.packed.pin_memory(), places=self.places.pin_memory())

    def padded(self, outputs: FusedHeadOutput) -> FusedHeadOutput:
        """Put per-token results [S] into the layout of the padded batch, [2B, T - 1]."""
        rows, length = self.shape
        laid_out = {}
        for field in fields(outputs):
            values = getattr(outputs, field.name)
            if values is not None and values.dim():  # not the router loss, which is one number
                flat = values.new_zeros(rows * (length - 1))
                values = flat.index_copy(0, self.places, values).view(rows, length - 1)
            laid_out[field.name] = values
        return FusedHeadOutput(**laid_out)


class CollatedBatch(dict[str, Any]):
    """A batch that takes its packed row along when its tensors are moved; what it finds changed by
    then loses it."""

    def to(self, device: Any, non_blocking: bool = False) -> CollatedBatch:
        """Move the tensors; accelerate calls this."""
        return self._with(lambda each: each.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CollatedBatch:
        """Pin the tensors; a DataLoader calls this."""
        return self._with(lambda each: each.pin_memory())

    def _with(self, change: Callable[[Any], Any]) -> CollatedBatch:
        entries = {
            name: change(value) if isinstance(value, Tensor) else value
            for name, value in self.items()
            if name != KEY
        }
        packed = packed_row(self)
        return _collated(entries, None if packed is None else change(packed))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle; a DataLoader's worker does."""
        packed = packed_row(self)
        entries = {name: value for name, value in self.items() if name != KEY}
        # Without its source, which what is read is no longer.
        return _collated, (entries, None if packed is None else replace(packed, source=()))


def _collated(entries: dict[str, Any], packed: PackedBatch | None) -> CollatedBatch:
    batch = CollatedBatch(entries)
    if packed is not None:
        batch[KEY] = packed.taken_to(batch)
    return batch


def packed_row(inputs: Mapping[str, Any]) -> PackedBatch | None:
    """Return the packed row of a batch; None where it has none, or one of other tensors."""
    packed: PackedBatch | None = inputs.get(KEY)
    return packed if packed is not None and packed.is_of(inputs) else None


def pack_batch(inputs: Mapping[str, Any]) -> PackedBatch:
    """Lay out a collated batch, rows 0..B-1 chosen and B..2B-1 rejected, as one row.

    The prompts of a pair are computed once where they are equal; truncation at the start
    ("keep_end") can cut them differently, and padding on the left can put them at different
    positions. Such a pair is packed without sharing. The first token after an empty prompt is not
    scored; a padded row scores it from the pad before it where padding is on the left.

    Raises:
        NotShareableError: the batch holds more than token ids, or its masks have another form.
    """
    other = [name for name in inputs if name not in KNOWN]
    if other:
        raise NotShareableError(f"the batch also has {', '.join(other)}, which are not packed")
    tensors = [inputs[name].long() for name in _IDS_AND_MASKS]
    ids, attention, completion = torch.stack(tensors).cpu().numpy()
    shape = ids.shape
    sequences = [
        _sequence(row, real, scored)
        for row, real, scored in zip(ids, attention != 0, completion != 0, strict=True)
    ]
    half = shape[0] // 2
    groups: list[Group] = []
    places: list[Any] = [np.zeros(0, np.int64)]
    for pair in range(half):
        chosen, rejected = sequences[pair], sequences[half + pair]
        if chosen.start == rejected.start and np.array_equal(chosen.prompt, rejected.prompt):
            both = [*chosen.completions, *rejected.completions]
            groups.append(Group(chosen.prompt, both, chosen.start))
        else:
            groups += [chosen, rejected]
        for row, (prompt, (tokens,), start) in ((pair, chosen), (half + pair, rejected)):
            # The result of the token in column t is in column t - 1. Without a prompt nothing
            # scores the first token.
            first = start + len(prompt) - 1 if len(prompt) else start
            end = start + len(prompt) + len(tokens) - 1
            places.append(np.arange(first, end) + row * (shape[1] - 1))
    if not any(len(prompt) + sum(map(len, tokens)) for prompt, tokens, _ in groups):
        raise NotShareableError("the batch has no token")
    return PackedBatch(
        pack(groups), torch.from_numpy(np.concatenate(places)), shape, _source(inputs)
    )


def _source(inputs: Mapping[str, Any]) -> tuple[tuple[Tensor, int], ...]:
    tensors = (inputs[name] for name in _IDS_AND_MASKS)
    return tuple((tensor, _version(tensor)) for tensor in tensors)


def _version(tensor: Tensor) -> int:
    """How often it was written to."""
    return 0 if tensor.is_inference() else tensor._version


def _sequence(ids: Any, real: Any, scored: Any) -> Group:
    """One padded row [T] as a prompt with one completion."""
    if (scored & ~real).any():
        raise NotShareableError(
            "a row of the batch has completion_mask 1 where attention_mask is 0: padded rows score "
            "that padding"
        )
    columns = np.flatnonzero(real)
    if not len(columns):
        return Group(ids[:0], [ids[:0]])
    start, end = int(columns[0]), int(columns[-1]) + 1
    prompt = end - int(scored.sum())
    if end - start != len(columns) or not scored[prompt:end].all():
        raise NotShareableError(
            "a row of the batch is not a prompt, then a completion, without gaps "
            "(attention_mask, completion_mask)"
        )
    return Group(ids[start:prompt], [ids[prompt:end]], start)


class PackingCollator:
    """A collator whose batches are laid out as well: on the CPU, where it runs, so that no step
    waits for a device to tell the lengths."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collator(examples)
        # A batch of another type, or one that cannot be packed, is seen to when it is used.
        if type(batch) is dict:
            with contextlib.suppress(NotShareableError):
                batch = _collated(batch, pack_batch(batch))
        return batch
