"""Data sets for precomputing: loaded from anywhere, tokenised by TRL's own code, truncated as TRL's
collator does.

The token ids must be those of the training, bit for bit, or nothing is found in the store. So the
installed TRL tokenises, with the settings of a DPOConfig.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from fusedpo._store_columns import truncate

from .records import Record

TRUNCATION_MODES = ("keep_start", "keep_end")
_LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


def load_data(data: Any, split: str | None = None) -> Any:
    """Return a `datasets.Dataset` with preferences.

    Args:
        data: a `Dataset`, a `DatasetDict`, a file (.json, .jsonl, .csv, .parquet, .arrow; .gz of
            these), a directory (written by `save_to_disk`, or with such files), or a name on the
            Hugging Face Hub.
        split: which split; needed only where there are several and none is called "train".

    Raises:
        FileNotFoundError, ValueError: nothing there, an unknown kind of file or split.
    """
    import datasets

    if isinstance(data, (str, os.PathLike)):
        data = _load(os.fspath(data), split)
    if isinstance(data, (datasets.DatasetDict, dict)):
        data = _one_split(data, split)
    if isinstance(data, datasets.IterableDataset):
        raise TypeError(
            "precompute needs a data set with a length, to plan its batches; got an "
            "IterableDataset. Train with ref_miss='compute': that scores a stream as it comes."
        )
    if not isinstance(data, datasets.Dataset):
        raise TypeError(f"data must be a Dataset, a path or a name; got {type(data).__name__}.")
    return data


def _load(data: str, split: str | None) -> Any:
    import datasets

    path = pathlib.Path(data)
    if path.is_file():
        suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst", ".xz")]
        loader = _LOADERS.get(suffixes[-1].lower() if suffixes else "")
        if loader is None:
            raise ValueError(
                f"data must end in {', '.join(_LOADERS)}; got {data}. Convert it, or pass a "
                "datasets.Dataset to fusedpo.precompute()."
            )
        return datasets.load_dataset(loader, data_files=data, split=split or "train")
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(data)
        return datasets.load_dataset(data)
    is_file_name = any(suffix.lower() in _LOADERS for suffix in path.suffixes)
    if is_file_name or path.is_absolute() or data.startswith(".") or data.count("/") > 1:
        raise FileNotFoundError(f"data must be a file, a directory or a hub name; no such: {data}")
    return datasets.load_dataset(data, split=split) if split else datasets.load_dataset(data)


def _one_split(splits: Any, split: str | None) -> Any:
    names = list(splits)
    if split is None:
        split = "train" if "train" in names or len(names) != 1 else names[0]
    if split not in names:
        raise ValueError(f"split must be one of {', '.join(names)}; got {split!r}. Use --split.")
    return splits[split]


def completion_columns(dataset: Any) -> tuple[str, ...]:
    """Return which columns are completions: ("chosen", "rejected") or ("completion",).

    Raises:
        ValueError: no rows, images, or neither kind of columns.
    """
    columns = dataset.column_names
    if "image" in columns or "images" in columns:
        raise ValueError(
            "precompute scores text; this data set has images, which the keys of a store do not "
            "cover."
        )
    if not len(dataset):
        raise ValueError("the data set has no rows.")
    if "chosen" in columns and "rejected" in columns:
        return "chosen", "rejected"
    if "prompt" in columns and "completion" in columns:
        return ("completion",)
    raise ValueError(
        "the data set must have the columns chosen and rejected (prompt is optional), or prompt "
        f"and completion; got {', '.join(columns)}. Rename columns first."
    )


def tokenize(
    dataset: Any,
    completions: Sequence[str],
    processing_class: Any,
    *,
    max_length: int | None,
    truncation_mode: str,
) -> TokenizedRows:
    """Tokenise a data set as TRL's DPOTrainer does (unpaired rows as its KTOTrainer does).

    Args:
        dataset: text, or lists of messages.
        completions: from `completion_columns`.
        processing_class: the tokenizer, or a vision model's processor.
        max_length: prompt and completion together are cut to that many tokens; None: not at all.
        truncation_mode: "keep_start" or "keep_end", as in DPOConfig.
    """
    check_truncation(max_length, truncation_mode)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    arguments = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode=truncation_mode
    )
    # All that these two methods read of a trainer.
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    import trl

    prepare: Any = (trl.DPOTrainer if len(completions) == 2 else trl.KTOTrainer)._prepare_dataset
    prepared = prepare(trainer, dataset, processing_class, arguments, "precompute")
    if not len(prepared):
        raise ValueError(
            f"every prompt alone has max_length={max_length} tokens or more; nothing is left to "
            "score. Use a larger max_length."
        )
    return TokenizedRows(
        prepared, [f"{name}_ids" for name in completions], max_length, truncation_mode
    )


class TokenizedRows:
    """A tokenised data set as records (a `records.Source`), cut as TRL's collator cuts them."""

    def __init__(
        self,
        dataset: Any,
        completion_columns: Sequence[str],
        max_length: int | None,
        truncation_mode: str,
    ) -> None:
        self.per_row = len(completion_columns)
        self.dataset = dataset  # with all its columns
        self._columns = ("prompt_ids", *completion_columns)
        self._dataset = dataset.with_format("numpy", columns=list(self._columns))
        self._max_length, self._truncation_mode = max_length, truncation_mode

    def __len__(self) -> int:
        return len(self._dataset)

    def records(self, rows: Sequence[int]) -> list[Record]:
        if not len(rows):
            return []
        table = self._dataset[rows if isinstance(rows, range) else list(rows)]
        return [
            self._record(prompt, completion)
            for prompt, *completions in zip(*(table[name] for name in self._columns), strict=True)
            for completion in completions
        ]

    def _record(self, prompt: Any, completion: Any) -> Record:
        cut = truncate(prompt, completion, self._max_length, self._truncation_mode)
        # Copies: torch wants arrays that it could write to.
        return Record(*(np.array(ids, dtype=np.int64) for ids in cut))


def check_truncation(max_length: int | None, truncation_mode: str) -> None:
    if max_length is not None and (isinstance(max_length, bool) or max_length < 1):
        raise ValueError(f"max_length must be at least 1, or None; got {max_length}.")
    if truncation_mode not in TRUNCATION_MODES:
        raise ValueError(
            f"truncation_mode must be keep_start or keep_end; got {truncation_mode!r}."
        )
