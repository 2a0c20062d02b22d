"""Margins and lengths of single pairs under a trained model and its reference.

Trainers log means of steps. What a single pair got is computed here, after the training, by the
same code that fills a reference store.
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedpo
from fusedpo._precompute.records import Record, keys_of
from fusedpo._precompute.run import require_packages

from .run_facts import find_beta
from .runs import Run

_ADAPTER = "adapter_config.json"
_MODEL = "config.json"
_STORE = "identity.json"


@dataclass(frozen=True, eq=False)
class PairScores:
    """One value for each of N pairs."""

    margins: NDArray[np.float64]  # [N] rewards, beta (r_c - r_r)
    chosen_lengths: NDArray[np.int64]  # [N] tokens
    rejected_lengths: NDArray[np.int64]  # [N] tokens

    def __len__(self) -> int:
        return len(self.margins)


def score_run(
    run: Run,
    data: Any,
    *,
    beta: float | None = None,
    reference: str | os.PathLike[str] | None = None,
    policy: str | os.PathLike[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> PairScores:
    """Score pairs with the model that a run ended with.

    Args:
        run: whose options of length and precision are used, and beta, unless it is named.
        data, split, limit: as for `score_pairs`.
        reference: as for `score_pairs`; for an adapter by default the model that it was made for.
        policy: by default the model beside the trainer_state.json, or in the run's folder.

    Raises:
        ValueError: no beta, no reference, or no model could be found; and as `score_pairs`.
    """
    if policy is None:
        folders = (run.path.parent, run.path.parent.parent)
        found = [
            each for each in folders if any((each / name).is_file() for name in (_ADAPTER, _MODEL))
        ]
        if not found:
            raise ValueError(f"{run.path.parent} must have the trained model; name it: --model")
        policy = found[0]
    adapter = pathlib.Path(policy) / _ADAPTER
    if reference is None and adapter.is_file():
        reference = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if reference is None:
        raise ValueError(
            "the reference must be named, because a run does not tell it: --reference MODEL, or "
            "the directory that `fusedpo precompute` made"
        )
    beta = find_beta(run) if beta is None else beta
    if beta is None:
        raise ValueError("beta must be named, because it was not saved with the run: --beta")
    return score_pairs(
        policy,
        reference,
        data,
        beta=beta,
        max_length=run.arguments.get("max_length", 1024),
        truncation_mode=run.arguments.get("truncation_mode", "keep_start"),
        autocast=_autocast(run),
        split=split,
        limit=limit,
    )


def _autocast(run: Run) -> str:
    if not run.arguments:
        return "auto"
    return next((kind for kind in ("bf16", "fp16") if run.arguments.get(kind)), "no")


def score_pairs(
    policy: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    data: Any,
    *,
    beta: float,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    autocast: str = "auto",
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
        autocast: as for `fusedpo.precompute`: auto (bf16), bf16, fp16 or no.
        split: of the data.
        limit: score only the first so many pairs.

    Raises:
        ValueError, FileNotFoundError, ImportError, fusedpo.StoreError: as `fusedpo.precompute`.
    """
    adapter = (pathlib.Path(policy) / _ADAPTER).is_file()
    require_packages(peft=adapter)
    # Here, so that a diagnosis without pairs needs none of what these import.
    from fusedpo._precompute import tables
    from fusedpo._precompute.data import load_data
    from fusedpo._precompute.reference import load_processing_class

    lengths: dict[str, Any] = {"max_length": max_length, "truncation_mode": truncation_mode}
    dataset = load_data(data, split)
    if not {"chosen", "rejected"} <= set(dataset.column_names):
        raise ValueError(
            f"pairs must have the columns chosen and rejected; got {dataset.column_names}"
        )
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
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
                model,
                dataset,
                store,
                processing_class=tokenizer,
                autocast=autocast,
                **lengths,
                **options,
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
