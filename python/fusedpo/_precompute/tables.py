"""Between a store and a data set of texts: its rows with the store's values as columns, its columns
into a store, and a store cut down to it.

A store knows token ids only; here a data set is tokenised as for a training first.
"""

from __future__ import annotations

import pathlib
from typing import Any

from fusedpo.store import MergeReport, RefStore

from .data import TokenizedRows, completion_columns, tokenize
from .records import index_records

_ROW = "fusedpo_row"


def tokenized(
    dataset: Any, processing_class: Any, max_length: int | None, truncation_mode: str
) -> TokenizedRows:
    return tokenize(
        dataset,
        completion_columns(dataset),
        processing_class,
        max_length=max_length,
        truncation_mode=truncation_mode,
    )


def with_columns(
    store: RefStore,
    dataset: Any,
    processing_class: Any,
    *,
    max_length: int | None,
    truncation_mode: str,
) -> Any:
    """Return the rows of `dataset` as they are, with the store's values as columns.

    Rows of which truncation leaves no completion are left out, as in a training.

    Raises:
        StoreError: records are not in the store.
    """
    numbered = dataset.add_column(_ROW, list(range(len(dataset))))
    rows = tokenized(numbered, processing_class, max_length, truncation_mode).dataset
    filled = store.add_columns(rows, max_length=max_length, truncation_mode=truncation_mode)
    result = dataset.select(rows[_ROW])
    for name in ("ref_chosen_logps", "ref_rejected_logps", "ref_logps"):
        if name in filled.column_names:
            if name in result.column_names:
                result = result.remove_columns(name)
            result = result.add_column(name, filled[name])
    return result


def take_columns(
    store: RefStore,
    dataset: Any,
    processing_class: Any,
    *,
    max_length: int | None,
    truncation_mode: str,
) -> int:
    """Store the values that a data set brings in columns; returns the number of records."""
    rows = tokenized(dataset, processing_class, max_length, truncation_mode).dataset
    return store.import_columns(rows, max_length=max_length, truncation_mode=truncation_mode)


def prune(
    store: RefStore,
    dataset: Any,
    processing_class: Any,
    *,
    max_length: int | None,
    truncation_mode: str,
    abandoned: bool,
) -> MergeReport:
    """Merge the store and drop every record that is not of `dataset`."""
    rows = tokenized(dataset, processing_class, max_length, truncation_mode)
    return store.prune(index_records(rows).keys, abandoned=abandoned)


def write(dataset: Any, path: str) -> None:
    """Write a data set to a .parquet or .jsonl file."""
    if path.endswith(".parquet"):
        dataset.to_parquet(path)
    elif path.endswith(".jsonl"):
        dataset.to_json(path, force_ascii=False, double_precision=15)
    else:
        raise ValueError(
            f"a data set is written to .parquet or .jsonl; got {pathlib.Path(path).name}."
        )
