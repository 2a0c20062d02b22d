"""Real files in every form: each is recognised, and comes back unchanged from every other form."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from fusedpo.tools.convert import convert
from fusedpo.tools.formats import PreferencePair, read_rows
from fusedpo.tools.formats.conversations import as_messages

pytestmark = pytest.mark.real_data

EXPECTED = {  # file -> (form, rows)
    "formats/llamafactory-dpo_en_demo.json": ("sharegpt", 300),
    "formats/llamafactory-dpo_zh_demo.json": ("sharegpt", 300),
    "formats/llamafactory-kto_en_demo.json": ("kto", 300),
    "kto/llamafactory-kto-en.jsonl": ("kto", 300),
    "preferences/anthropic-evals-yesno.jsonl": ("preference", 1000),
    "preferences/llamafactory-dpo-en.conversational.jsonl": ("conversational", 300),
    "preferences/llamafactory-dpo-en.jsonl": ("preference", 295),
    "preferences/llamafactory-dpo-zh.jsonl": ("preference", 289),
    "preferences/llmbar.jsonl": ("preference", 419),
    "preferences/pandalm-human.jsonl": ("preference", 760),
    "preferences/stackexchange-paired-tiny.jsonl": ("preference", 25),
    "preferences/tinystories-vs-260k.jsonl": ("preference", 850),
}


def rows_of(path: pathlib.Path) -> list[dict[str, Any]]:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def converted(source: Any, output: pathlib.Path, **options: str) -> list[dict[str, Any]]:
    """The rows of `output`; every row must go through."""
    assert convert(source, output, **options).problems == []
    return rows_of(output)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_real_file_is_recognised_and_all_of_it_is_read(
    name: str, real_data: pathlib.Path
) -> None:
    loaded = read_rows(real_data / name)
    assert (loaded.form, len(loaded.rows)) == EXPECTED[name]
    assert (loaded.problems, loaded.not_carried) == ([], {})


@pytest.mark.parametrize("name", EXPECTED)
def test_a_real_file_comes_back_from_every_other_form(
    name: str, real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    values = [as_messages(row.value)[0] for row in read_rows(real_data / name).rows]
    pairs = isinstance(values[0], PreferencePair)
    forms = ("conversational", "sharegpt", "hh", "preference") if pairs else ("kto", "unpaired")
    for form in forms:
        output = tmp_path / f"{form}.jsonl"
        assert convert(real_data / name, output, to=form).problems == []
        again = [as_messages(row.value)[0] for row in read_rows(output).rows]
        assert again == values, form


def test_sharegpt_becomes_the_same_conversations_and_sharegpt_again(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    original = real_data / "formats/llamafactory-dpo_en_demo.json"
    rows = converted(original, tmp_path / "a.jsonl", to="conversational")
    assert rows == rows_of(real_data / "preferences/llamafactory-dpo-en.conversational.jsonl")
    assert converted(tmp_path / "a.jsonl", tmp_path / "b.json", to="sharegpt") == rows_of(original)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_sharegpt_becomes_the_transcripts_that_others_made_of_it(
    language: str, real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    original = real_data / f"formats/llamafactory-dpo_{language}_demo.json"
    rows = converted(original, tmp_path / "a.jsonl", to="preference")
    known = rows_of(real_data / f"preferences/llamafactory-dpo-{language}.jsonl")
    # Theirs leaves out rows with an empty or the same completion, and rows that were there before.
    kept = []
    for row in rows:
        texts = row["chosen"].strip(), row["rejected"].strip()
        if all(texts) and texts[0] != texts[1] and row not in kept:
            kept.append(row)
    assert kept == known


def test_messages_with_a_label_become_the_transcripts_that_others_made_of_them(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    original = real_data / "formats/llamafactory-kto_en_demo.json"
    rows = converted(original, tmp_path / "a.jsonl", to="unpaired", template="hh")
    assert rows == rows_of(real_data / "kto/llamafactory-kto-en.jsonl")
    assert converted(tmp_path / "a.jsonl", tmp_path / "b.json", to="kto") == rows_of(original)


def test_pairs_come_back_from_labelled_completions(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    original = real_data / "preferences/llmbar.jsonl"
    rows = converted(original, tmp_path / "a.jsonl", to="unpaired")
    assert len(rows) == 2 * 419
    assert converted(tmp_path / "a.jsonl", tmp_path / "b.jsonl", to="preference") == rows_of(
        original
    )


def test_a_tokenizers_template_gives_the_token_ids_of_its_conversations(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """TRL applies the template to conversations by itself: both ways must train on the same."""
    pytest.importorskip("trl", reason="needs the extra trl")
    from datasets import Dataset
    from fusedpo._precompute.data import tokenize
    from transformers import AutoTokenizer

    folder = str(real_data / "tokenizers/qwen2.5")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = real_data / "preferences/llamafactory-dpo-en.conversational.jsonl"
    pairs = [row.value for row in read_rows(original).rows[:20]]
    conversations = converted(pairs, tmp_path / "a.jsonl", to="conversational")
    texts = converted(pairs, tmp_path / "b.jsonl", to="preference", tokenizer=folder)
    of_conversations, of_texts = (
        tokenize(
            Dataset.from_list(rows),
            ("chosen", "rejected"),
            tokenizer,
            max_length=None,
            truncation_mode="keep_start",
        ).records(range(20))
        for rows in (conversations, texts)
    )
    line_break = tokenizer("\n")["input_ids"]
    for conversation, text in zip(of_conversations, of_texts, strict=True):
        assert conversation.prompt.tolist() == text.prompt.tolist()
        # The template breaks the line after the end of a turn; a text for training ends before.
        assert conversation.completion.tolist() == text.completion.tolist() + line_break
