"""`fusedpo lint` counts tokens, truncation and drops as TRL 1.14 and newer do."""

from __future__ import annotations

import csv
import itertools
import json
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="compares with TRL")
pytest.importorskip("rapidfuzz", reason="fusedpo.tools.lint needs the extra tools")

import trl
from datasets import Dataset
from fusedpo.tools.convert import convert
from fusedpo.tools.formats import read_rows
from fusedpo.tools.lint import lint
from fusedpo.tools.lint.encoding import Encoded, Limit, encode
from lint_cases import CASES, CHAT, CLEAN_TEXTS, THINKING, make_tokenizer, of, write
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference


def turns(*contents: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[index % 2], "content": content}
        for index, content in enumerate(contents)
    ]


ROWS = {
    "strings": [*of("strings", CLEAN_TEXTS), *CASES["prompt_is_no_prefix"].faulty],
    "messages": [*of("messages", CLEAN_TEXTS), *CASES["odd_turns"].faulty],
    "labels": of("labels", CLEAN_TEXTS),
    "labelled messages": [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": index % 2 == 0}
        for index, row in enumerate(of("messages", CLEAN_TEXTS))
    ],
    "transcripts": [
        {side: f"\n\nHuman: {prompt}\n\nAssistant: {text}" for side, text in sides.items()}
        for prompt, chosen, rejected in [
            *CLEAN_TEXTS,
            ("Say it.", "The same beginning.", "The same end."),
            ("One or two?", "One.", "One. And two."),
            ("Where?", "Here.\n\nHuman: And?\n\nAssistant: There.", "Here.\n\nHuman: Oh!"),
        ]
        for sides in [{"chosen": chosen, "rejected": rejected}]
    ],
    "conversations": [
        *(
            {"chosen": turns(prompt, chosen), "rejected": turns(prompt, rejected)}
            for prompt, chosen, rejected in CLEAN_TEXTS
        ),
        # They part where the user goes on, so that TRL's prompt ends with the assistant.
        {
            "chosen": turns("Hi", "Yes?", "Who?", "I."),
            "rejected": turns("Hi", "Yes?", "Me?", "No."),
        },
        {
            "chosen": turns("Hi", "Yes?", "Who?", "I."),
            "rejected": turns("Hi", "Yes?", "Who?", "No."),
        },
    ],
}
ROWS["transcripts"][-1]["rejected"] += "\n\nAssistant: There, too."


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
        ("labelled messages", {"bos": True}),
        ("transcripts", {}),
        ("transcripts", {"template": None}),  # as gpt2: no chat template is needed
        ("conversations", {}),
    ],
)
def test_counts_are_those_of_trl(kind: str, options: Any, tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer(**options)
    limit = Limit(None)
    found = ours(tmp_path, ROWS[kind], tokenizer, limit)
    expected = of_trl(ROWS[kind], tokenizer, limit)
    assert len(found) == len(expected)
    for each, row in zip(found, expected, strict=True):
        names = ("completion_ids",) if "label" in ROWS[kind][0] else ("chosen_ids", "rejected_ids")
        assert each.prompt == len(row["prompt_ids"])
        assert each.completions == tuple(len(row[name]) for name in names)
        assert each.error == ""
        assert each.ends == all(tokenizer.eos_token_id in row[name] for name in names)


@pytest.mark.parametrize(
    ("kind", "mode", "max_length"),
    [
        *itertools.product(("strings", "messages"), ("keep_start", "keep_end"), (7, 8, 16, 24, 40)),
        *itertools.product(("transcripts", "conversations"), ("keep_start",), (16, 24)),
        *itertools.product(("labels", "labelled messages"), ("keep_start",), (7, 8, 16, 24, 40)),
    ],
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
    collate: Any
    if "label" in ROWS[kind][0]:
        collate = DataCollatorForUnpairedPreference(tokenizer.pad_token_id, max_length)
    else:
        collate = DataCollatorForPreference(tokenizer.pad_token_id, max_length, mode)
    for index, row in expected.items():
        batch = collate([row])
        completion = batch["completion_mask"].bool()
        prompt = batch["attention_mask"].bool() & ~completion
        assert found[index].kept == tuple(completion.sum(1).tolist())
        assert found[index].kept_prompt == tuple(prompt.sum(1).tolist())
        ids = batch["input_ids"]
        same = ids.shape[0] == 2 and bool((ids[0] == ids[1]).all())
        assert found[index].same_when_cut == same


def test_conversations_that_part_at_the_user_have_a_prompt_that_is_no_prefix(
    tmp_path: pathlib.Path,
) -> None:
    data = write(tmp_path / "data.jsonl", ROWS["conversations"])
    finding = lint(data, tokenizer=make_tokenizer()).finding("prompt_is_no_prefix")
    assert finding is not None
    assert finding.lines == (len(ROWS["conversations"]) - 1,)


UNREAD: dict[str, dict[str, Any]] = {
    "a text beside conversations": {
        "prompt": "Hi",
        "chosen": turns("Hi", "Yes."),
        "rejected": turns("Hi", "No."),
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "messages and a label": {"messages": turns("Hi", "Yes."), "label": True},
    "an instruction": {"instruction": "Hi", "output": ["Yes.", "No."]},
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_trl_does_not_read_is_told_and_counted_as_after_a_conversion(
    kind: str, tmp_path: pathlib.Path
) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises((TypeError, KeyError, ValueError, AttributeError)):
        of_trl([UNREAD[kind]], tokenizer, Limit(None))
    source = write(tmp_path / "data.jsonl", [UNREAD[kind]])
    finding = lint(source).finding("not_read_by_trl")
    assert finding is not None
    assert finding.lines == (1,)
    converted = tmp_path / "converted.jsonl"
    to = "unpaired" if "label" in UNREAD[kind] else "conversational"
    convert(source, converted, to=to)
    assert lint(converted).finding("not_read_by_trl") is None
    counted, expected = (
        encode(read_rows(file).rows, tokenizer, Limit(None)) for file in (source, converted)
    )
    assert counted == expected


def test_a_label_that_is_a_text_is_told(tmp_path: pathlib.Path) -> None:
    rows = [{"prompt": "Hi", "completion": "No.", "label": "false"}]
    finding = lint(write(tmp_path / "data.jsonl", rows)).finding("not_read_by_trl")
    assert finding is not None
    assert finding.examples[0].text == "its label is the text 'false'"


def test_messages_in_the_cells_of_a_csv_are_told(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "data.csv").open("w", newline="") as file:
        cells = csv.writer(file)
        cells.writerow(["prompt", "chosen", "rejected"])
        parts = (turns("Hi"), turns("Hi", "Yes.")[1:], turns("Hi", "No.")[1:])
        cells.writerow([json.dumps(each) for each in parts])
    finding = lint(tmp_path / "data.csv").finding("not_read_by_trl")
    assert finding is not None
    assert finding.examples[0].text == "it takes messages in a CSV for texts"


def test_an_instruction_that_trl_would_not_see_is_told(tmp_path: pathlib.Path) -> None:
    rows = [{"instruction": "Hi", "chosen": "Yes.", "rejected": "No."}]
    finding = lint(write(tmp_path / "data.jsonl", rows)).finding("not_read_by_trl")
    assert finding is not None
    assert finding.examples[0].text == "there is no column prompt"


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
