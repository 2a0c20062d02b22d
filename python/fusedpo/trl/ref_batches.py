"""Records from the trainer's batches: what is looked up is what the model is given.

Whatever tokenised, truncated, padded or collated the rows, the batch has the token ids that count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fusedpo._precompute.records import Record
from fusedpo.trl import ref_images
from fusedpo.trl.packed_batch import KEY

# What the keys of a store cover, or what changes no log-prob.
_COVERED = frozenset(
    {
        "input_ids",
        "attention_mask",
        "completion_mask",
        "token_type_ids",
        "ref_chosen_logps",
        "ref_rejected_logps",
        "use_cache",
        KEY,
    }
)
_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def records_of_batch(inputs: Mapping[str, Any]) -> list[Record]:
    """Return the records of a collated batch, [2B]: the chosen ones, then the rejected ones.

    One transfer from the device. Positions that the attention mask leaves out count nowhere, so
    padding on either side makes no difference.

    Raises:
        ValueError: the batch holds more that the model is given, for example pixels of which nobody
            has told the rows (ref_images).
    """
    images = inputs.get(ref_images.KEY)
    other = [
        name
        for name in inputs
        if name not in _COVERED and (images is None or not ref_images.is_of_images(name))
    ]
    if other:
        raise ValueError(
            f"a reference store covers token ids; the batch also has {', '.join(other)}, on which "
            "the log-probs may depend. Train without ref_store, or drop these from the collator."
        )
    names = ("input_ids", "attention_mask", "completion_mask")
    ids, attention, completion = torch.stack([inputs[name].long() for name in names]).cpu().numpy()
    records = []
    for row, real, scored in zip(ids, attention != 0, completion != 0, strict=True):
        records.append(Record(row[real & ~scored], row[real & scored]))
    if images is None:
        return records
    # The pictures stand before the prompt that has them.
    return [
        record
        if digest[0] < 0
        else Record(np.concatenate([digest, record.prompt]), record.completion)
        for digest, record in zip(images.cpu().numpy(), records, strict=True)
    ]


class CollatedRows:
    """A prepared data set as records (a `records.Source`), by way of the trainer's collator."""

    per_row = 2

    def __init__(self, dataset: Any, collator: Callable[[list[dict[str, Any]]], Any]) -> None:
        known = [name for name in _COLUMNS if name in dataset.column_names]
        # A collator of the user's may read other columns; TRL's reads these.
        self._dataset = dataset.select_columns(known) if len(known) == 3 else dataset
        self._collator = collator

    def __len__(self) -> int:
        return len(self._dataset)

    def records(self, rows: Sequence[int]) -> list[Record]:
        if not len(rows):
            return []
        columns = self._dataset[list(rows)]
        examples = [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
        batch = records_of_batch(self._collator(examples))
        chosen, rejected = batch[: len(examples)], batch[len(examples) :]
        return [each for pair in zip(chosen, rejected, strict=True) for each in pair]
