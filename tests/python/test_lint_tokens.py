"""`fusedpo lint` counts tokens, truncation and drops as TRL 1.14 and newer do."""

from __future__ import annotations

import itertools
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="compares with TRL")
pytest.importorskip("rapidfuzz", reason="fusedpo.tools.lint needs the extra tools")

import trl
from datasets import Dataset
from fusedpo.tools.formats import read_rows
from fusedpo.tools.lint import lint
from fusedpo.tools.lint.encoding import Encoded, Limit, encode
from lint_cases import CASES, CHAT, CLEAN_TEXTS, THINKING, make_tokenizer, of, write
from trl.trainer.dpo_trainer import DataCollatorForPreference

ROWS = {
    "strings": [*of("strings", CLEAN_TEXTS), *CASES["prompt_is_no_prefix"].faulty],
    "messages": [*of("messages", CLEAN_TEXTS), *CASES["odd_turns"].faulty],
    "labels": of("labels", CLEAN_TEXTS),
}


def of_trl(rows: list[Any], tokenizer: Any, limit: Limit) -> list[dict[str, Any]]:
    """The rows as TRL tokenises them, in order, without those that it drops."""
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    options = SimpleNamespace(
        dataset_num_proc=None,
        max_length=limit.max_length,
        truncation_mode=limit.truncation_mode,
    )
    dataset = Dataset.from_list([{**row, "row": index} for index, row in enumerate(rows)])
    trainer_class = trl.DPOTrainer if "chosen" in rows[0] else trl.KTOTrainer
    return list(trainer_class._prepare_dataset(trainer, dataset, tokenizer, options, "lint"))


def ours(folder: pathlib.Path, rows: list[Any], tokenizer: Any, limit: Limit) -> list[Encoded]:
    return encode(read_rows(write(folder / "data.jsonl", rows)).rows, tokenizer, limit)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("strings", {}),
        ("strings", {"bos": True}),
        ("messages", {}),
        ("messages", {"bos": True}),
        ("messages", {"template": THINKING}),
        ("messages", {"template": CHAT.replace("<eos>", "")}),
        ("labels", {}),
    ],
)
def test_counts_are_those_of_trl(kind: str, options: Any, tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer(**options)
    limit = Limit(None)
    found = ours(tmp_path, ROWS[kind], tokenizer, limit)
    expected = of_trl(ROWS[kind], tokenizer, limit)
    assert len(found) == len(expected)
    for each, row in zip(found, expected, strict=True):
        names = ("completion_ids",) if kind == "labels" else ("chosen_ids", "rejected_ids")
        assert each.prompt == len(row["prompt_ids"])
        assert each.completions == tuple(len(row[name]) for name in names)
        assert each.ends == all(tokenizer.eos_token_id in row[name] for name in names)


@pytest.mark.parametrize(
    ("kind", "mode", "max_length"),
    list(
        itertools.product(("strings", "messages"), ("keep_start", "keep_end"), (7, 8, 16, 24, 40))
    ),
)
def test_truncation_and_drops_are_those_of_trl(
    kind: str, mode: str, max_length: int, tmp_path: pathlib.Path
) -> None:
    tokenizer = make_tokenizer()
    limit = Limit(max_length, mode)
    found = ours(tmp_path, ROWS[kind], tokenizer, limit)
    expected = {row["row"]: row for row in of_trl(ROWS[kind], tokenizer, limit)}
    finding = lint(
        tmp_path / "data.jsonl", tokenizer=tokenizer, max_length=max_length, truncation_mode=mode
    ).finding("dropped_by_max_length")
    assert (finding.count if finding else 0) == len(found) - len(expected)
    collate = DataCollatorForPreference(
        pad_token_id=tokenizer.pad_token_id, max_length=max_length, truncation_mode=mode
    )
    for index, row in expected.items():
        batch = collate([row])
        completion = batch["completion_mask"].bool()
        prompt = batch["attention_mask"].bool() & ~completion
        assert found[index].kept == tuple(completion.sum(1).tolist())
        assert found[index].kept_prompt == tuple(prompt.sum(1).tolist())
        ids = batch["input_ids"]
        same = ids.shape[0] == 2 and bool((ids[0] == ids[1]).all())
        assert found[index].same_when_cut == same


def test_labelled_rows_are_cut_at_their_end_alone(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="must be keep_start for labelled rows"):
        ours(tmp_path, ROWS["labels"], make_tokenizer(), Limit(8, "keep_end"))


def test_without_an_eos_token_strings_cannot_be_tokenised(tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    rows = of("strings", CLEAN_TEXTS)
    assert {each.error for each in ours(tmp_path, rows, tokenizer, Limit(None))} == {
        "the tokenizer has no end-of-sequence token"
    }


def test_without_a_chat_template_messages_cannot_be_tokenised(tmp_path: pathlib.Path) -> None:
    rows = of("messages", CLEAN_TEXTS)
    found = ours(tmp_path, rows, make_tokenizer(template=None), Limit(None))
    assert all("chat_template" in each.error for each in found)
    assert all(each.completions == (0, 0) for each in found)
