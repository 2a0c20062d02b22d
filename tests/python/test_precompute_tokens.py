"""What precompute scores has the token ids of the training, for every setting that changes them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl", reason="precompute tokenises with TRL")

from datasets import Dataset, DatasetDict
from fusedpo._precompute.data import completion_columns, load_data, tokenize
from fusedpo._precompute.records import Record
from fusedpo._store_columns import truncate
from trl import DPOTrainer, KTOConfig, KTOTrainer
from trl_helpers import (
    conversational,
    make_config,
    make_model,
    make_pairs,
    make_tokenizer,
    one_thread,  # noqa: F401  a fixture
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

Rows = list[dict[str, Any]]


def _with_system(rows: Rows) -> Rows:
    return [
        row | {"prompt": [{"role": "system", "content": "a dog"}, *row["prompt"]]} for row in rows
    ]


def _implicit(rows: Rows) -> Rows:
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]


def _with_eos(rows: Rows) -> Rows:
    return [row | {"chosen": row["chosen"] + "<eos>"} for row in rows]


SETTINGS: dict[str, tuple[Callable[[Rows], Any], dict[str, Any]]] = {
    "text": (lambda rows: rows, {}),
    "text that ends in EOS": (_with_eos, {}),
    "no prompt column": (_implicit, {}),
    "conversations": (conversational, {}),
    "conversations with a system turn": (lambda rows: _with_system(conversational(rows)), {}),
    "cut at the end": (lambda rows: rows, {"max_length": 8}),
    "cut so that some rows are dropped": (lambda rows: rows, {"max_length": 6}),
    "cut at the start": (lambda rows: rows, {"max_length": 7, "truncation_mode": "keep_end"}),
    "completion alone": (lambda rows: rows, {"max_length": 3, "truncation_mode": "keep_end"}),
    "conversations cut": (conversational, {"max_length": 9}),
    "not cut at all": (lambda rows: rows, {"max_length": None}),
}


def of_batch(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of each row of a collated batch, without our own code."""
    found = []
    for ids, attention, completion in zip(
        batch["input_ids"].tolist(),
        batch["attention_mask"].tolist(),
        batch["completion_mask"].tolist(),
        strict=True,
    ):
        prompt = [i for i, a, c in zip(ids, attention, completion, strict=True) if a and not c]
        found.append((prompt, [i for i, c in zip(ids, completion, strict=True) if c]))
    return found


def plain(records: list[Record]) -> list[tuple[list[int], list[int]]]:
    return [(record.prompt.tolist(), record.completion.tolist()) for record in records]


@pytest.mark.parametrize("setting", SETTINGS)
def test_ids_are_those_of_dpo_trainers_batches(setting: str, tmp_path: pathlib.Path) -> None:
    make_rows, options = SETTINGS[setting]
    dataset = Dataset.from_list(make_rows(make_pairs(12)))
    trainer = DPOTrainer(
        make_model(),
        ref_model=make_model(),
        args=make_config(tmp_path, **options),
        train_dataset=dataset,
        processing_class=make_tokenizer(),
    )
    rows = trainer.train_dataset
    want = of_batch(trainer.data_collator([rows[i] for i in range(len(rows))]))
    source = tokenize(
        dataset,
        completion_columns(dataset),
        make_tokenizer(),
        max_length=options.get("max_length", 1024),
        truncation_mode=options.get("truncation_mode", "keep_start"),
    )
    got = plain(source.records(range(len(source))))
    assert len(want) == 2 * len(source) > 0
    assert got[0::2] == want[: len(source)]
    assert got[1::2] == want[len(source) :]


@pytest.mark.parametrize("form", ["text", "conversations"])
def test_unpaired_ids_are_those_of_kto_trainer(form: str, tmp_path: pathlib.Path) -> None:
    rows: Any = make_pairs(8)
    if form == "conversations":
        rows = conversational(rows)
    unpaired = Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
    )
    assert completion_columns(unpaired) == ("completion",)
    trainer = KTOTrainer(
        make_model(),
        ref_model=make_model(),
        args=KTOConfig(
            output_dir=str(tmp_path),
            bf16=False,
            use_cpu=True,
            report_to="none",
            max_length=9,
            per_device_train_batch_size=4,
        ),
        train_dataset=unpaired,
        processing_class=make_tokenizer(),
    )
    source = tokenize(
        unpaired, ("completion",), make_tokenizer(), max_length=9, truncation_mode="keep_start"
    )
    got = plain(source.records(range(len(source))))
    want = [
        (
            row["prompt_ids"],
            (row["prompt_ids"] + row["completion_ids"])[:9][len(row["prompt_ids"]) :],
        )
        for row in trainer.train_dataset
    ]
    assert got == want


def test_records_of_scattered_rows_are_those_of_the_whole() -> None:
    dataset = Dataset.from_list(make_pairs(9))
    source = tokenize(
        dataset,
        ("chosen", "rejected"),
        make_tokenizer(),
        max_length=1024,
        truncation_mode="keep_start",
    )
    whole = plain(source.records(range(9)))
    assert plain(source.records([7, 0, 3])) == [whole[i] for i in (14, 15, 0, 1, 6, 7)]
    assert source.records([]) == []


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_is_a_slice_of_the_whole_sequence(length: int, mode: str) -> None:
    prompt, completion = [1, 2, 3], [4, 5, 6, 7]
    cut_prompt, cut_completion = truncate(prompt, completion, length, mode)
    part = slice(None, length) if mode == "keep_start" else slice(-length, None)
    assert cut_prompt + cut_completion == (prompt + completion)[part]
    assert set(cut_prompt) <= set(prompt)
    assert set(cut_completion) <= set(completion)


def test_the_first_token_of_a_sequence_is_not_scored() -> None:
    for prompt, completion, scored in (
        ([1], [2, 3], 2),
        ([], [2, 3], 1),
        ([1], [], 0),
        ([], [], 0),
    ):
        record = Record(np.array(prompt, np.int64), np.array(completion, np.int64))
        assert record.num_tokens == scored


def test_data_come_from_files_and_directories_of_every_kind(tmp_path: pathlib.Path) -> None:
    rows = make_pairs(5)
    dataset = Dataset.from_list(rows)
    # U+2028 is a line separator for str.splitlines, not for JSON lines.
    rows[0]["prompt"] += "\u2028"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "lines").mkdir()
    for name in ("pairs.jsonl", "lines/train.jsonl"):
        (tmp_path / name).write_text(lines, encoding="utf-8")
    (tmp_path / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    dataset.to_parquet(tmp_path / "pairs.parquet")
    dataset.to_csv(tmp_path / "pairs.csv")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict({"one": dataset, "train": dataset.select(range(2))}).save_to_disk(tmp_path / "two")
    for name in ("pairs.jsonl", "pairs.json", "pairs.parquet", "pairs.csv", "lines", "saved"):
        loaded = load_data(str(tmp_path / name))
        assert len(loaded) == 5, name
        assert loaded[1]["chosen"] == rows[1]["chosen"], name
    assert len(load_data(tmp_path / "two")) == 2
    assert len(load_data(tmp_path / "two", "one")) == 5
    with pytest.raises(ValueError, match=r"split must be one of one, train; got 'test'"):
        load_data(tmp_path / "two", "test")
    (tmp_path / "pairs.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data must end in \.json"):
        load_data(str(tmp_path / "pairs.txt"))
    for mistyped in ("pairs.jsonl", "data/pairs.csv", "pairs.json.gz"):  # no names of the Hub
        with pytest.raises(FileNotFoundError, match=f"no such: {mistyped}"):
            load_data(mistyped)
    with pytest.raises(FileNotFoundError, match="no such"):
        load_data(str(tmp_path / "nothing.jsonl"))


def test_bad_data_are_refused_with_what_was_found() -> None:
    with pytest.raises(ValueError, match="got text"):
        completion_columns(Dataset.from_list([{"text": "a"}]))
    with pytest.raises(ValueError, match="no rows"):
        completion_columns(Dataset.from_dict({"chosen": [], "rejected": []}))
    with pytest.raises(ValueError, match="images"):
        completion_columns(Dataset.from_list([{"chosen": "a", "rejected": "b", "images": [1]}]))
    with pytest.raises(TypeError, match="IterableDataset"):
        load_data(Dataset.from_list(make_pairs(2)).to_iterable_dataset())
    with pytest.raises(ValueError, match="nothing is left"):
        tokenize(
            Dataset.from_list(make_pairs(3)),
            ("chosen", "rejected"),
            make_tokenizer(),
            max_length=2,
            truncation_mode="keep_start",
        )
    with pytest.raises(ValueError, match="truncation_mode must be"):
        tokenize(
            Dataset.from_list(make_pairs(3)),
            ("chosen", "rejected"),
            make_tokenizer(),
            max_length=9,
            truncation_mode="middle",
        )
