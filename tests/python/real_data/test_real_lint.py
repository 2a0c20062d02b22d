"""`fusedpo lint` on real preferences: what is known to be wrong with them, and no false alarms."""

from __future__ import annotations

import itertools
import json
import pathlib
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="compares with TRL")
pytest.importorskip("rapidfuzz", reason="fusedpo.tools.lint needs the extra tools")

import trl
from datasets import Dataset
from fusedpo.tools.formats import read_rows
from fusedpo.tools.lint import lint
from fusedpo.tools.lint.encoding import Limit, encode
from transformers import AutoTokenizer

pytestmark = pytest.mark.real_data

# What was looked at, row by row, and is really there.
KNOWN = {
    "llamafactory-dpo-en.conversational": {"duplicate_rows": 5, "unlike_sides": 2},
    "llamafactory-dpo-zh": {"turn_marks": 1},  # a rejected answer that goes on as the user
    "pandalm-human": {"prompt_at_start": 2, "circular_preferences": 3},
    "tinystories-vs-260k": {"suspicious_characters": 51},  # quotation marks, read as Latin-1
    "anthropic-evals-yesno": {"short_completions": 1000},
}


def read(path: pathlib.Path) -> list[Any]:
    with path.open(encoding="utf-8") as file:  # some texts contain U+2028: no splitlines
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_wrong_with_real_data_is_found(name: str, real_data: pathlib.Path) -> None:
    report = lint(real_data / f"preferences/{name}.jsonl")
    found = {each.rule: each.count for each in report.findings}
    assert found.items() >= KNOWN[name].items()


def test_curated_data_has_no_errors(real_data: pathlib.Path) -> None:
    for file in sorted((real_data / "preferences").glob("*.jsonl")):
        report = lint(file)
        assert not report.failed, (file, report.findings[0])


def test_a_known_bias_has_its_sign(real_data: pathlib.Path) -> None:
    """LLMBar was made so that the longer answer is mostly the wrong one."""
    lengths = lint(real_data / "preferences/llmbar.jsonl").lengths[0]
    assert lengths.bias is not None
    assert lengths.bias.effect_size < -0.5


@pytest.mark.parametrize(
    ("data", "vocabulary"),
    [
        ("tinystories-vs-260k", "qwen2.5"),  # has prompts that are no prefix
        ("llamafactory-dpo-en.conversational", "qwen2.5"),
        ("pandalm-human", "gpt2"),
    ],
)
def test_token_counts_are_those_of_trl(data: str, vocabulary: str, real_data: pathlib.Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(real_data / "tokenizers" / vocabulary))
    file = real_data / f"preferences/{data}.jsonl"
    found = encode(read_rows(file).rows[:150], tokenizer, Limit(None))
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    options = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    rows = Dataset.from_list(read(file)[:150])
    expected = trl.DPOTrainer._prepare_dataset(trainer, rows, tokenizer, options, "lint")
    for each, row in zip(found, expected, strict=True):
        assert each.prompt == len(row["prompt_ids"])
        assert each.completions == (len(row["chosen_ids"]), len(row["rejected_ids"]))


def test_ten_thousand_pairs_take_less_than_thirty_seconds(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    names = ("llamafactory-dpo-en", "pandalm-human", "llmbar", "tinystories-vs-260k")
    rows = [row for name in names for row in read(real_data / f"preferences/{name}.jsonl")]
    data = tmp_path / "tiled.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for index, row in zip(range(10_000), itertools.cycle(rows), strict=False):
            # Made different, or half of the work would be found done.
            file.write(json.dumps({key: f"{text} {index}" for key, text in row.items()}) + "\n")
    before = time.process_time()  # of one core, whatever else runs
    report = lint(data)
    assert report.rows == 10_000
    assert time.process_time() - before < 30
