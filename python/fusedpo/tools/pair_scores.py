"""Margins and lengths of single pairs under a trained model and its reference.

Trainers log means of steps. What a single pair got is computed here, after the training, by the
same code that fills a reference store.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedpo
from fusedpo._precompute import tables
from fusedpo._precompute.data import load_data
from fusedpo._precompute.records import Record, keys_of
from fusedpo._precompute.reference import load_processing_class

_ADAPTER = "adapter_config.json"
_STORE = "identity.json"


@dataclass(frozen=True, eq=False)
class PairScores:
    """One value for each of N pairs."""

    margins: NDArray[np.float64]  # [N] rewards, beta (r_c - r_r)
    chosen_lengths: NDArray[np.int64]  # [N] tokens
    rejected_lengths: NDArray[np.int64]  # [N] tokens

    def __len__(self) -> int:
        return len(self.margins)


def score_pairs(
    policy: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    data: Any,
    *,
    beta: float,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    split: str | None = None,
    limit: int | None = None,
) -> PairScores:
    """Score pairs with a trained model and with its reference.

    Args:
        policy: folder of the trained model, or of its PEFT adapter, which goes on `reference`.
        reference: a model, or a directory of reference log-probs made by `fusedpo precompute`,
            which must have all pairs.
        data: as in `fusedpo.precompute`.
        beta: of the training; scales the margins.
        max_length, truncation_mode: as in the training's DPOConfig.
        split: of the data.
        limit: score only the first so many pairs.

    Raises:
        ValueError, FileNotFoundError, ImportError, fusedpo.StoreError: as `fusedpo.precompute`.
    """
    lengths: dict[str, Any] = {"max_length": max_length, "truncation_mode": truncation_mode}
    dataset = load_data(data, split)
    if not {"chosen", "rejected"} <= set(dataset.column_names):
        raise ValueError(
            f"pairs must have the columns chosen and rejected; got {dataset.column_names}"
        )
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    adapter = (pathlib.Path(policy) / _ADAPTER).is_file()
    stored = (pathlib.Path(reference) / _STORE).is_file()
    base = str(_model_of(reference) if stored and adapter else reference)
    model = base if adapter else str(policy)
    tokenizer = load_processing_class(model, None)
    rows = tables.tokenized(dataset, tokenizer, max_length, truncation_mode)
    records = rows.records(range(len(rows)))  # chosen, rejected, chosen, ...
    with tempfile.TemporaryDirectory() as folder:

        def fill(name: str, model: str, **options: Any) -> str:
            store = f"{folder}/{name}"
            fusedpo.precompute(
                model, dataset, store, processing_class=tokenizer, **lengths, **options
            )
            return store

        policy_store = fill("policy", model, ref_adapter=policy if adapter else None)
        reference_store = reference if stored else fill("reference", base)
        ratios = _logps(policy_store, records) - _logps(reference_store, records)
    tokens = np.array([record.num_tokens for record in records], np.int64)
    return PairScores(beta * (ratios[::2] - ratios[1::2]), tokens[::2], tokens[1::2])


def _model_of(store: str | os.PathLike[str]) -> str:
    model = fusedpo.RefStore(store).identity.get("info", {}).get("model")
    if not model:
        raise ValueError(f"{store} does not tell its model; name the model as the reference")
    return str(model)


def _logps(store: str | os.PathLike[str], records: Sequence[Record]) -> NDArray[np.float64]:
    """Log-prob of each record, nats; 0 of one of which truncation leaves nothing to score."""
    found, logps, _ = fusedpo.RefStore(store).lookup(keys_of(records))
    missing = [record for record, there in zip(records, found, strict=True) if not there]
    if any(record.num_tokens for record in missing):
        raise ValueError(
            f"{store} must have every completion of the data; {len(missing)} of {len(records)} are "
            "missing. Run `fusedpo precompute` on this data, or name the model as the reference"
        )
    return np.where(found, logps, 0.0)
