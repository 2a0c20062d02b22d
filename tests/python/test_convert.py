"""`fusedpo convert`: each direction, and what is reported."""

from __future__ import annotations

import json
import pathlib

import pytest
from convert_cases import (
    PAIR,
    TEXTS,
    assistant,
    user,
    values,
    write,
)
from fusedpo.tools.convert import convert
from fusedpo.tools.formats import (
    FormatError,
    LabelledCompletion,
    PreferencePair,
    to_record,
)


def test_pairs_become_two_rows_each_and_labels_alternate(tmp_path: pathlib.Path) -> None:
    report = convert([PAIR, PAIR], tmp_path / "a.jsonl", to="kto")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows[:2] == [
        {"messages": [user("2+2?"), assistant("4")], "label": True},
        {"messages": [user("2+2?"), assistant("5")], "label": False},
    ]
    assert (report.rows_read, report.rows_written) == (2, 4)


def test_labelled_rows_become_pairs_and_those_without_a_partner_are_reported(
    tmp_path: pathlib.Path,
) -> None:
    rows = [
        {"prompt": "a", "completion": "bad", "label": False},
        {"prompt": "b", "completion": "alone", "label": True},
        {"prompt": "a", "completion": "good", "label": True},
        {"prompt": "a", "completion": "second", "label": True},
    ]
    source = write(tmp_path / "a.jsonl", rows)
    report = convert(source, tmp_path / "b.jsonl", to="preference")
    assert values(tmp_path / "b.jsonl") == [PreferencePair("a", "good", "bad")]
    assert [(p.file, p.line, p.reason) for p in report.problems] == [
        (str(source), line, "no completion with label false is left for the same prompt")
        for line in (2, 4)
    ]


def test_texts_stay_as_they_are_without_a_template(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.jsonl", [TEXTS])
    report = convert(source, tmp_path / "b.json", to="preference")
    assert json.loads((tmp_path / "b.json").read_text()) == [TEXTS]
    assert (report.template, report.read_as) == (None, {})
    convert(source, tmp_path / "c.jsonl", to="unpaired")
    assert values(tmp_path / "c.jsonl")[0] == LabelledCompletion("2+2?", " 4", True)


def test_texts_of_one_template_are_written_in_another(tmp_path: pathlib.Path) -> None:
    transcript = {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"}
    source = write(tmp_path / "a.jsonl", [transcript])
    report = convert(source, tmp_path / "b.jsonl", to="preference", template="zephyr")
    assert values(tmp_path / "b.jsonl") == [
        PreferencePair("<|user|>\n2+2?</s>\n<|assistant|>\n", "4</s>", "5</s>")
    ]
    assert (report.template, report.read_as) == ("zephyr", {"hh": 1})


def test_conversations_become_transcripts_where_no_template_is_named(
    tmp_path: pathlib.Path,
) -> None:
    report = convert([PAIR], tmp_path / "a.jsonl", to="preference")
    assert values(tmp_path / "a.jsonl") == [
        PreferencePair("\n\nHuman: 2+2?\n\nAssistant:", " 4", " 5")
    ]
    assert report.template == "hh"
    assert "1 row of preference, template hh" in report.render()


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("sharegpt", "sharegpt must have one message as chosen; got 3"),
        ("kto", "kto must have one message as the completion; got 3"),
    ],
)
def test_what_a_form_cannot_hold_is_reported(
    form: str, reason: str, tmp_path: pathlib.Path
) -> None:
    long = PreferencePair(PAIR.prompt, [assistant("4"), user("?"), assistant("4")], PAIR.rejected)
    report = convert([PAIR, long], tmp_path / "a.jsonl", to=form)
    assert [(p.line, p.reason) for p in report.problems] == [(2, reason)]


def test_transcripts_need_a_prompt(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FormatError, match="hh must have a prompt"):
        to_record(PreferencePair([], [assistant("a")], [assistant("b")]), "hh")


def test_a_value_that_the_form_does_not_hold_is_refused() -> None:
    with pytest.raises(FormatError, match="kto must hold completions with a label; got a Pref"):
        to_record(PAIR, "kto")
    with pytest.raises(FormatError, match="hh must hold pairs; got a LabelledCompletion"):
        to_record(LabelledCompletion("a", "b", True), "hh")


def test_a_row_that_cannot_be_converted_is_reported_and_the_others_go_through(
    tmp_path: pathlib.Path,
) -> None:
    rows = [TEXTS, {"prompt": "a", "chosen": 1, "rejected": "b"}]
    rows += [{**TEXTS, "prompt": "a\n\nHuman: b"}, TEXTS, ["no row"]]
    source = write(tmp_path / "a.jsonl", rows)
    report = convert(source, tmp_path / "b.jsonl", to="sharegpt")
    assert [problem.line for problem in report.problems] == [2, 3, 5]
    assert (report.rows_read, report.rows_written) == (5, 2)
    assert len(values(tmp_path / "b.jsonl")) == 2
    text = report.render()
    assert f"{source}:2: chosen must be a text; got 1" in text
    assert "3 rows could not be converted" in text


def test_what_is_wrong_with_both_completions_of_a_pair_is_reported_once(
    tmp_path: pathlib.Path,
) -> None:
    source = write(tmp_path / "a.jsonl", [TEXTS, {**TEXTS, "prompt": "a\n\nHuman: b"}])
    report = convert(source, tmp_path / "b.jsonl", to="kto")
    assert [problem.line for problem in report.problems] == [2]
    assert report.rows_written == 2


def test_columns_that_are_lost_are_told(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.jsonl", [{**TEXTS, "id": 7}, TEXTS])
    report = convert(source, tmp_path / "b.jsonl", to="conversational")
    assert report.not_carried == {"id": 1}
    assert "not carried over: id (1 row)" in report.render()
    assert "2 rows had no marks of turns" in report.render()


def test_rows_of_the_input_are_counted_where_each_became_two(tmp_path: pathlib.Path) -> None:
    report = convert(write(tmp_path / "a.jsonl", [TEXTS] * 3), tmp_path / "b.jsonl", to="kto")
    assert report.read_as == {"plain": 3}
    assert "3 rows had no marks of turns" in report.render()


@pytest.mark.parametrize(
    "prompt", ["[INST] 2+2? [/INST]", "Below is a task.\n\n### Instruction:\n2+2?", "User: 2+2?"]
)
def test_marks_of_an_unknown_template_are_told(prompt: str, tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.jsonl", [{**TEXTS, "prompt": prompt}, TEXTS])
    report = convert(source, tmp_path / "b.jsonl", to="sharegpt")
    assert report.read_as == {"unknown": 1, "plain": 1}
    assert "1 row had marks of turns of a template that is not known here" in report.render()


def test_a_report_sends_nothing_to_the_terminal(tmp_path: pathlib.Path) -> None:
    rows = [{**TEXTS, "\x1b[2J": 1}, {**TEXTS, "chosen": [{"\x1b[2J": 1}]}]
    text = convert(write(tmp_path / "a.jsonl", rows), tmp_path / "b.jsonl", to="hh").render()
    assert "not carried over: [U+001B][2J (1 row)" in text
    assert "\x1b" not in text


def test_a_long_list_of_problems_is_cut_in_the_text_alone(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.jsonl", [TEXTS, *([{"prompt": 1}] * 30)])
    report = convert(source, tmp_path / "b.jsonl", to="hh")
    assert "and 10 more; --json lists all" in report.render()
    assert len(report.as_dict()["problems"]) == 30


def test_values_that_are_no_conversation_are_reported_by_their_number(
    tmp_path: pathlib.Path,
) -> None:
    wrong = PreferencePair([{"role": "cook", "content": "a"}], PAIR.chosen, PAIR.rejected)
    report = convert([PAIR, wrong], tmp_path / "a.jsonl", to="hh")
    assert "the values:2: prompt[0].role must be one of" in str(report.problems[0])
    with pytest.raises(ValueError, match="only a file has a form to name; got form='hh'"):
        convert([PAIR], tmp_path / "a.jsonl", to="hh", form="hh")
    with pytest.raises(FormatError, match="at least one value"):
        convert([], tmp_path / "a.jsonl", to="hh")
