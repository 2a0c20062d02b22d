"""Prompts computed once in a trainer: from TRL's padded batch to one packed row, and back.

TRL's collator pads a batch of B pairs to [2B, T], every prompt twice. That batch stays as it is:
labels, masks, metrics and the reference store read it. Beside it the packed row is laid out, on the
CPU where the batch is collated; the model is given the row, and what it returns for each scored
token goes back to its place in [2B, T - 1].
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
from fusedpo._packing.architectures import active_dropout, why_not_exact
from fusedpo._packing.attention import use_packed_attention
from fusedpo._packing.layout import Group, Packed, pack

KEY = "packed_batch"
_IDS_AND_MASKS = ("input_ids", "attention_mask", "completion_mask")
# What a batch may hold besides token ids; more than this would have to be packed, too.
_KNOWN = frozenset(
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
    source: tuple[tuple[int, int], ...]  # which tensors it was made of, and their versions

    def to(self, device: Any, non_blocking: bool = False) -> PackedBatch:
        """Move the tensors; accelerate calls this on what it finds in a batch."""
        return replace(
            self,
            packed=self.packed.to(device, non_blocking=non_blocking),
            places=self.places.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> PackedBatch:
        """Pin the tensors; a DataLoader calls this on what it finds in a batch."""
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


def pack_batch(inputs: Mapping[str, Any]) -> PackedBatch:
    """Lay out a collated batch, rows 0..B-1 chosen and B..2B-1 rejected, as one row.

    The prompts of a pair are computed once where they are equal; truncation at the start
    ("keep_end") can cut them differently, and padding on the left can put them at different
    positions. Such a pair is packed without sharing.

    Raises:
        NotShareableError: the batch holds more than token ids, or its masks have another form.
    """
    other = [name for name in inputs if name not in _KNOWN]
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


def _source(inputs: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Tells the tensors of a batch from others, and whether they were written to since."""
    tensors = (inputs[name] for name in _IDS_AND_MASKS)
    return tuple((id(t), 0 if t.is_inference() else t._version) for t in tensors)


def _sequence(ids: Any, real: Any, scored: Any) -> Group:
    """One padded row [T] as a prompt with one completion."""
    columns = np.flatnonzero(real)
    if not len(columns):
        return Group(ids[:0], [ids[:0]])
    start, end = int(columns[0]), int(columns[-1]) + 1
    prompt = end - int((scored & real).sum())
    if end - start != len(columns) or not scored[prompt:end].all():
        raise NotShareableError(
            "a row of the batch is not a prompt, then a completion, without gaps "
            "(attention_mask, completion_mask)"
        )
    return Group(ids[start:prompt], [ids[prompt:end]], start)


class PackingCollator:
    """The trainer's collator, whose batches are laid out as well: on the CPU, where it runs, so
    that no step waits for a device to tell the lengths."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collator(examples)
        # A batch that cannot be packed is told about when it is used.
        with contextlib.suppress(NotShareableError):
            batch[KEY] = pack_batch(batch)
        return batch


class SharedPrompts:
    """Whether and how a trainer computes each prompt once; see `FusedDPOTrainer`."""

    def __init__(self, trainer: Any, mode: Any) -> None:
        """Decide for a trainer that was just built, and prepare its models and its collator.

        Raises:
            ValueError: `mode` is True, and a model is not known to be exact.
        """
        # Not the trainer itself: a cycle would keep it, and DDP's threads in it, until Python ends.
        self._print = trainer.accelerator.print
        self._mode = mode
        reason = None if mode is False else why_not_shared(trainer)
        self.active = mode is not False and reason is None
        if reason is not None:
            self._give_up(reason)
        if not self.active:
            return
        for model in _models(trainer):
            use_packed_attention(model)
        if not _dispatches(trainer):
            trainer.data_collator = PackingCollator(trainer.data_collator)

    def _give_up(self, reason: str) -> None:
        if self._mode is True:
            raise ValueError(
                "share_prompts=True must have a model and batches for which it is exact; "
                f"{reason}. Pass share_prompts='auto' or False to train on padded batches."
            )
        self.active = False
        self._print(
            f"fusedpo: prompts are not shared, batches are padded as TRL pads them: {reason}"
        )

    def arrived(self, inputs: dict[str, Any]) -> None:
        """Take note of the tensors of a batch that came from a worker, or was moved to a device."""
        packed = inputs.get(KEY)
        if packed is not None:
            inputs[KEY] = replace(packed, source=_source(inputs))

    def batch(self, inputs: dict[str, Any]) -> PackedBatch | None:
        """Return the packed form of a batch, or None where it is to be run padded. It is kept in
        the batch: the reference and the metrics need it again.

        Raises:
            ValueError: `share_prompts` is True, and the batch cannot be packed.
        """
        if not self.active:
            return None
        packed = inputs.get(KEY)
        if packed is None or packed.source != _source(inputs) or not _KNOWN.issuperset(inputs):
            try:
                # Not from our collator, or changed since: this waits for the device.
                packed = pack_batch(inputs)
            except NotShareableError as error:
                self._give_up(str(error))
                return None
        batch: PackedBatch = packed.to(inputs["input_ids"].device, non_blocking=True)
        inputs[KEY] = batch
        return batch


def why_not_shared(trainer: Any) -> str | None:
    """Return why a trainer's models cannot share prompts, or None."""
    models = _models(trainer)
    for name, model in zip(("model", "ref_model"), models, strict=False):
        reason = why_not_exact(model)
        if reason is not None:
            return f"{name}: {reason}"
    dropout = active_dropout(models[0])
    if dropout is not None:
        return f"model: dropout is active ({dropout})"
    if trainer.args.neftune_noise_alpha:
        return "neftune_noise_alpha adds noise that depends on the length of a padded row"
    return None


def _models(trainer: Any) -> list[Any]:
    models = [trainer.model] + ([] if trainer.ref_model is None else [trainer.ref_model])
    return [trainer.accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]


def _dispatches(trainer: Any) -> bool:
    """Whether accelerate cuts the batches of one process into those of several: then only tensors
    of one row per sequence may be in them, and each process lays out its own."""
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        return False
    configured = accelerator.dataloader_config.dispatch_batches
    if configured is not None:  # as TRL does for a stream to train on
        return bool(configured)
    splits = trainer.eval_dataset
    splits = splits.values() if isinstance(splits, Mapping) else [splits]
    return any(isinstance(split, torch.utils.data.IterableDataset) for split in splits)
