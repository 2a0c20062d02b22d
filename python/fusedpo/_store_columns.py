"""Between a store and tables: columns of data sets, parquet and arrow files.

pyarrow is imported only by what needs it.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._store_error import StoreError
from ._store_keys import Keys, record_keys

if TYPE_CHECKING:
    from .store import RefStore

_BATCH = 1000
# Columns of ids -> the column of their log-probs; both sides after the prompt.
_PAIRED = {"chosen_ids": "ref_chosen_logps", "rejected_ids": "ref_rejected_logps"}
_UNPAIRED = {"completion_ids": "ref_logps"}


def truncate(
    prompt: list[int], completion: list[int], max_length: int | None, mode: str
) -> tuple[list[int], list[int]]:
    """The ids that are scored: prompt and completion cut as TRL's collator cuts the sequence."""
    if max_length is None or len(prompt) + len(completion) <= max_length:
        return prompt, completion
    if mode == "keep_start":
        return prompt[:max_length], completion[: max(0, max_length - len(prompt))]
    if mode == "keep_end":
        cut = len(prompt) + len(completion) - max_length
        return prompt[cut:], completion[max(0, cut - len(prompt)) :]
    raise StoreError(
        f'truncation_mode must be "keep_start" or "keep_end"; got {mode!r}', "bad_value"
    )


def num_scored(prompt: Sized, completion: Sized) -> int:
    """Tokens that get a log-prob: the first of a sequence has nothing to be predicted from."""
    return max(0, len(completion) - (len(prompt) == 0))


def _column_names(dataset: Any) -> list[str]:
    if isinstance(dataset, Mapping):
        return list(dataset)
    return list(dataset.column_names)


def _batches(dataset: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(dataset, Mapping):
        yield dataset
    elif type(dataset).__module__.partition(".")[0] == "pyarrow":
        for batch in dataset.to_batches(max_chunksize=_BATCH):
            yield batch.to_pydict()
    else:
        yield from dataset.iter(batch_size=_BATCH)


def _id_columns(dataset: Any) -> dict[str, str]:
    names = _column_names(dataset)
    for columns in (_PAIRED, _UNPAIRED):
        if {"prompt_ids", *columns} <= set(names):
            return columns
    raise StoreError(
        "the data set must be tokenised: columns prompt_ids, chosen_ids, rejected_ids, or "
        f"prompt_ids, completion_ids; got {', '.join(names)}",
        "bad_value",
    )


class _Keyed(NamedTuple):
    """One column of completions: those of which truncation leaves a token to score."""

    rows: NDArray[np.intp]  # [N] their rows in the batch
    keys: Keys  # [N, 16]
    num_tokens: NDArray[np.int64]  # [N]
    unscored: NDArray[np.float64]  # [rows] values of those left out, 0 elsewhere


def _keyed(batch: Mapping[str, Any], column: str, max_length: int | None, mode: str) -> _Keyed:
    pairs = [
        truncate(list(p), list(c), max_length, mode)
        for p, c in zip(batch["prompt_ids"], batch[column], strict=True)
    ]
    counts = np.array([num_scored(p, c) for p, c in pairs], np.int64)
    rows = np.flatnonzero(counts)
    keys = record_keys([pairs[i][0] for i in rows], [pairs[i][1] for i in rows])
    # No completion: a row that no training has. One first token: the sum over no token.
    unscored = np.array([0.0 if c else np.nan for _, c in pairs], np.float64)
    return _Keyed(rows, keys, counts[rows], unscored)


def add_columns(store: RefStore, dataset: Any, max_length: int | None, mode: str) -> Any:
    columns = _id_columns(dataset)
    values: dict[str, list[Any]] = {name: [] for name in columns.values()}
    rows = missing = 0
    first: tuple[int, str] | None = None
    for batch in _batches(dataset):
        for column, name in columns.items():
            keyed = _keyed(batch, column, max_length, mode)
            found, logps, num_tokens = store.lookup(keyed.keys)
            _check_counts(store, found, num_tokens, keyed, rows, column)
            column_values = keyed.unscored
            column_values[keyed.rows] = logps
            values[name].append(column_values)
            missing += int((~found).sum())
            if first is None and not found.all():
                first = rows + int(keyed.rows[np.argmin(found)]), column
        rows += len(batch["prompt_ids"])
    if first is not None:
        raise StoreError(
            f"{missing} of {rows * len(columns)} records are not in the store; the first is "
            f"{first[1]} of row {first[0]}. Were they tokenised and truncated as the store's "
            "were? `fusedpo precompute` adds what is missing",
            "missing_records",
            str(store.path),
        )
    flat = {name: np.concatenate(v) if v else np.zeros(0) for name, v in values.items()}
    if isinstance(dataset, Mapping):
        return {**dataset, **{name: values_of.tolist() for name, values_of in flat.items()}}
    for name, values_of in flat.items():
        if name in dataset.column_names:
            dataset = dataset.remove_columns(name)
        dataset = dataset.add_column(name, values_of)
    return dataset


def _check_counts(
    store: RefStore, found: Any, num_tokens: Any, keyed: _Keyed, first_row: int, column: str
) -> None:
    wrong = np.flatnonzero(found & (num_tokens != keyed.num_tokens))
    if len(wrong):
        raise wrong_count(
            store,
            f"{column} of row {first_row + keyed.rows[wrong[0]]}",
            num_tokens[wrong[0]],
            keyed.num_tokens[wrong[0]],
        )


def wrong_count(store: RefStore, what: str, stored: int, scored: int) -> StoreError:
    return StoreError(
        f"{what} has {scored} tokens to score, and the store has a value for {stored}: it was not "
        "computed for these ids. Were wrong values imported? Make the store anew",
        "contradiction",
        str(store.path),
    )


def import_columns(store: RefStore, dataset: Any, max_length: int | None, mode: str) -> int:
    names = set(_column_names(dataset))
    raw = {"key", "logps", "num_tokens"} <= names
    if not raw:
        columns = _id_columns(dataset)
        absent = sorted(set(columns.values()) - names)
        if absent:
            raise StoreError(
                f"the data set has no column {absent[0]}, which holds the log-probs to import",
                "bad_value",
            )
    records = 0
    with store.writer("import") as w:
        for batch in _batches(dataset):
            if raw:
                records += _import_raw(w, batch)
                continue
            for column, name in columns.items():
                keyed = _keyed(batch, column, max_length, mode)
                logps = np.asarray(batch[name], np.float64)[keyed.rows]
                w.append(keyed.keys, logps, keyed.num_tokens)
                records += len(keyed.rows)
    store.refresh()
    return records


def _import_raw(w: Any, batch: Mapping[str, Any]) -> int:
    n = len(batch["logps"])
    joined = b"".join(bytes(key) for key in batch["key"])
    if len(joined) != 16 * n:
        raise StoreError("column key must hold 16 bytes for every record", "bad_value")
    keys = np.frombuffer(joined, np.uint8).reshape(n, 16)
    logps = np.asarray(batch["logps"], np.float64)
    num_tokens = np.asarray(batch["num_tokens"])
    values = batch.get("token_logps")
    has = np.array([values is not None and values[i] is not None for i in range(n)], bool)
    if not has.all():
        w.append(keys[~has], logps[~has], num_tokens[~has])
    if has.any() and values is not None:
        chosen = [values[i] for i in np.flatnonzero(has)]
        w.append(keys[has], logps[has], num_tokens[has], chosen)
    return n


def export(store: RefStore, path: pathlib.Path) -> int:
    if path.suffix not in (".parquet", ".arrow"):
        raise StoreError(f"export writes .parquet or .arrow files; got {path}", "bad_value")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise StoreError(
            "export needs pyarrow: pip install pyarrow (the snapshot itself is a .safetensors "
            "file that needs nothing)",
            "needs_extra",
        ) from e
    schema = pa.schema(
        [
            ("key", pa.binary(16)),
            ("logps", pa.float64()),
            ("num_tokens", pa.uint32()),
            ("token_logps", pa.list_(pa.float32())),
        ]
    )
    records = 0
    # Whole or not at all: under its name only when it is complete.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with (
            pq.ParquetWriter(temporary, schema)
            if path.suffix == ".parquet"
            else pa.ipc.new_file(str(temporary), schema)
        ) as writer:
            for keys, logps, num_tokens, values, offsets in store.batches(8192):
                lengths = np.diff(offsets)
                lists = pa.ListArray.from_arrays(
                    pa.array(offsets.astype(np.int32), mask=np.append(lengths == 0, False)),
                    pa.array(values),
                )
                key = pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(16), len(logps), [None, pa.py_buffer(keys.tobytes())]
                )
                columns = [key, pa.array(logps), pa.array(num_tokens), lists]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                records += len(logps)
        os.replace(temporary, path)
    except OSError as e:
        raise StoreError(f"cannot write {path}: {e}", "io", str(path)) from e
    finally:
        temporary.unlink(missing_ok=True)
    return records
