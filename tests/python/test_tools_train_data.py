"""The rows of `fusedpo train`: every form, every strategy, and what is held out."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

pytest.importorskip("trl", reason="fusedpo.tools.train needs TRL")

from fusedpo.tools.train import resolve
from fusedpo.tools.train.data import Data, load_data, prompts_of
from tools_train_helpers import write_rows
from trl_helpers import conversational, make_pairs

PAIR = {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}
TURN = [{"role": "user", "content": "2+2?"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("4", "5"))
# One row of each form, and the three texts or conversations that it is.
FORMS: dict[str, tuple[dict[str, Any], Any, Any, Any]] = {
    "preference": (PAIR, "2+2?", " 4", " 5"),
    "conversational": ({"prompt": TURN, "chosen": GOOD, "rejected": BAD}, TURN, GOOD, BAD),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        *(TURN, GOOD, BAD),
    ),
    "hh": (
        {
            "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
            "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
        },
        *(TURN, GOOD, BAD),
    ),
    "instruction": ({"instruction": "2+2?", "output": ["4", "5"]}, TURN, GOOD, BAD),
}


def load(path: str, strategy: str = "dpo", **options: Any) -> Data:
    return load_data(resolve({"strategy": strategy, "model_name": "m", "dataset": path, **options}))


@pytest.mark.parametrize("form", FORMS)
def test_pairs_of_every_form_become_columns_of_trl(form: str, tmp_path: pathlib.Path) -> None:
    row, prompt, chosen, rejected = FORMS[form]
    path = write_rows(tmp_path / "rows.jsonl", [row])
    data = load(path)
    assert data.form == form
    assert data.train[0] == {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert load(path, "kto").train[0] == data.train[0]  # KTOTrainer takes pairs apart
    assert load(path, "sft").train[0] == {"prompt": prompt, "completion": chosen}


def test_labelled_completions_serve_kto_and_the_good_ones_sft(tmp_path: pathlib.Path) -> None:
    rows = [{"prompt": "2+2?", "completion": f" {n}", "label": n == 4} for n in (4, 5, 4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert list(load(path, "kto").train) == rows
    sft = load(path, "sft")
    assert list(sft.train) == [{"prompt": "2+2?", "completion": " 4"}] * 2
    assert sft.unused == 1
    with pytest.raises(ValueError, match=r"must have pairs .* got 3 rows of the form 'kto'"):
        load(path, "simpo")


@pytest.mark.parametrize(
    "row", [{"text": "a b"}, {"messages": TURN + GOOD}, {"prompt": "a", "completion": " b"}]
)
def test_sft_takes_columns_that_are_trls_own(row: dict[str, Any], tmp_path: pathlib.Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row])
    assert list(load(path, "sft").train) == [row]


def test_rows_that_cannot_be_read_are_told_and_left_out(tmp_path: pathlib.Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [PAIR, {"prompt": 1}, PAIR])
    data = load(path)
    assert len(data.train) == 2
    assert data.as_dict()["unreadable_rows"] == 1
    assert data.as_dict()["problems"][0].startswith(f"{path}:2: ")


def test_no_prompt_is_on_both_sides(tmp_path: pathlib.Path) -> None:
    rows = [{**PAIR, "prompt": f"question {n % 10}", "chosen": f" {n}"} for n in range(40)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = load(path, eval_split=0.25)
    sides = [set(side["prompt"]) for side in (data.train, data.evaluation)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {row["prompt"] for row in rows}
    assert len(data.evaluation) == 12  # whole prompts: three of four rows each
    assert len(load(path, eval_split=8).evaluation) == 8
    assert load(path, eval_split=8).digest == load(path, eval_split=8).digest
    assert load(path, eval_split=8, seed=1).digest != load(path, eval_split=8).digest


def test_conversations_are_held_out_by_their_prompt(tmp_path: pathlib.Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", conversational(make_pairs(30)))
    data = load(path, eval_split=0.3)
    sides = [{json.dumps(p) for p in side["prompt"]} for side in (data.train, data.evaluation)]
    assert not sides[0] & sides[1]


def test_an_eval_split_may_be_a_file(tmp_path: pathlib.Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [PAIR] * 3)
    held_out = write_rows(tmp_path / "eval.jsonl", [{**PAIR, "prompt": "3+1?"}, {"prompt": 1}])
    data = load(path, eval_split=held_out)
    assert (len(data.train), data.evaluation["prompt"], len(data.problems)) == (3, ["3+1?"], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_split": "test"}, "eval_split must be a share .* or a file .*; got 'test'"),
        ({"dataset_train_split": "train"}, "dataset_train_split is for data on the Hub"),
        ({"dataset_config": "en"}, "dataset_config is for data on the Hub"),
    ],
)
def test_a_file_has_no_splits(
    options: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [PAIR] * 3)
    with pytest.raises(ValueError, match=message):
        load(path, **options)


def test_too_few_prompts_to_hold_one_out_are_an_error(tmp_path: pathlib.Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [PAIR] * 5)
    with pytest.raises(ValueError, match="must leave rows on both sides; of 5 rows with 1 differ"):
        load(path, eval_split=0.2)


def test_a_file_that_is_not_there_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"rows\.jsonl"):
        load(str(tmp_path / "rows.jsonl"))


def test_prompts_are_distinct_and_no_more_than_asked_for(tmp_path: pathlib.Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [PAIR, PAIR, {**PAIR, "prompt": "1?"}, PAIR])
    assert prompts_of(load(path).train, 5) == ["2+2?", "1?"]
    assert prompts_of(load(path).train, 1) == ["2+2?"]


def test_a_folder_of_data_is_read_by_datasets(tmp_path: pathlib.Path) -> None:
    write_rows(tmp_path / "train.jsonl", [PAIR] * 2)
    data = load(str(tmp_path))
    assert (data.form, list(data.train)) == ("hub", [PAIR] * 2)
