"""`fusedpo convert`: round trips, pairs and labels, what is reported, and what is never lost."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import typing
from typing import Any

import pytest
from convert_cases import assistant, conversations, pairs, texts, user
from fusedpo.tools.convert import convert
from fusedpo.tools.formats import (
    FORMS,
    TARGETS,
    FormatError,
    LabelledCompletion,
    PreferencePair,
    Row,
    from_record,
    read_rows,
    to_record,
)
from fusedpo.tools.formats.renderers import RENDERERS
from fusedpo.tools.pairing import as_labelled, as_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

PAIR = PreferencePair([user("2+2?")], [assistant("4")], [assistant("5")])
TEXTS = {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}


def write(path: pathlib.Path, rows: list[Any]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values(path: pathlib.Path) -> list[Any]:
    loaded = read_rows(path)
    assert loaded.problems == []
    return [row.value for row in loaded.rows]


# Round trips ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["conversational", "sharegpt", "hh"])
@settings(deadline=None)
@given(pair=pairs())
def test_a_pair_is_the_same_after_it_was_written_as(form: str, pair: PreferencePair) -> None:
    record = to_record(pair, form)
    assert [name for name in FORMS if FORMS[name].matches(record)] == [form]
    assert from_record(record, form) == pair


@pytest.mark.parametrize("form", ["kto", "unpaired"])
@settings(deadline=None)
@given(prompt=conversations, completion=texts, label=st.booleans())
def test_a_labelled_completion_is_the_same_after_it_was_written_as(
    form: str, prompt: Any, completion: str, label: bool
) -> None:
    value = LabelledCompletion(prompt, [assistant(completion)], label)
    assert from_record(to_record(value, form), "kto") == value


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from("abc")] * 3), max_size=6))
def test_pairs_are_the_same_after_they_were_labelled_completions(
    given_texts: list[tuple[str, str, str]],
) -> None:
    rows = [
        Row(PreferencePair(*each), "a", line, {}) for line, each in enumerate(given_texts, start=1)
    ]
    assert as_pairs(as_labelled(rows)) == (rows, [])


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), texts, st.booleans()), max_size=8))
def test_each_labelled_completion_is_in_one_pair_or_reported(
    labelled: list[tuple[str, str, bool]],
) -> None:
    rows = [
        Row(LabelledCompletion(*each), "a", line, {}) for line, each in enumerate(labelled, start=1)
    ]
    paired, alone = as_pairs(rows)
    split = [row.value for row in as_labelled(paired)]
    used = [rows[problem.line - 1].value for problem in alone] + split
    assert sorted(map(repr, used)) == sorted(repr(row.value) for row in rows)
    # Nothing that could be a pair is left: the reported ones of a prompt have one label.
    for prompt in "ab":
        left = [rows[problem.line - 1].value for problem in alone]
        assert len({v.label for v in left if v.prompt == prompt}) <= 1


CHAIN = ("conversational", "sharegpt", "hh", "preference", "kto", "unpaired", "conversational")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_files_through_every_form_end_as_they_began(ending: str, tmp_path: pathlib.Path) -> None:
    odd = "A\u2028B\x85C\r\nD \U0001f600"
    before = [PAIR, PreferencePair([user(odd)], [assistant(f"{odd}1")], [assistant("")])]
    source = tmp_path / f"0{ending}"
    convert(before, source, to="conversational")
    for step, form in enumerate(CHAIN, start=1):
        output = tmp_path / f"{step}{ending}"
        report = convert(source, output, to=form)
        assert report.problems == []
        source = output
    assert values(source) == before


# Each direction ---------------------------------------------------------------------------------


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


# What is reported -------------------------------------------------------------------------------


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


# What is never lost -----------------------------------------------------------------------------


def test_nothing_is_written_where_no_row_can_be(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(FormatError, match=r"no row of .* could be converted.*a.jsonl:1: no compl"):
        convert(source, tmp_path / "b.jsonl", to="hh")
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("by", ["name", "link", "hard link"])
def test_the_input_is_never_overwritten(by: str, tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.jsonl", [TEXTS])
    before = source.read_bytes()
    output = source if by == "name" else tmp_path / "b.jsonl"
    if by == "link":
        output.symlink_to(source)
    elif by == "hard link":
        os.link(source, output)
    with pytest.raises(ValueError, match="the output must not be the input"):
        convert(source, output, to="hh")
    assert source.read_bytes() == before


def test_an_old_output_stays_until_the_new_one_is_complete(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "b.jsonl"
    output.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            convert([PAIR], output, to="hh")
    assert output.read_text() == "old"
    assert os.listdir(tmp_path) == ["b.jsonl"]
    convert([PAIR], output, to="hh")
    assert values(output) == [PAIR]


def test_an_output_that_is_a_link_stays_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "real.jsonl")
    convert([PAIR], tmp_path / "b.jsonl", to="hh")
    assert (tmp_path / "b.jsonl").is_symlink()
    assert values(tmp_path / "real.jsonl") == [PAIR]


# Wrong arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "dpo"}, "the form to write must be one of preference, .*got 'dpo'"),
        ({"to": "hh", "form": "dpo"}, "the form must be one of preference, .*got 'dpo'"),
        ({"to": "preference", "template": "x"}, "template must be one of hh, .*got 'x'"),
        ({"to": "sharegpt", "template": "chatml"}, "sharegpt does not take one"),
        ({"to": "unpaired", "template": "hh", "tokenizer": "a"}, "got both"),
    ],
)
def test_wrong_arguments_are_refused(
    options: dict[str, str], message: str, tmp_path: pathlib.Path
) -> None:
    source = write(tmp_path / "a.jsonl", [TEXTS])
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "b.jsonl", **options)


@pytest.mark.parametrize(
    ("output", "kind", "message"),
    [
        ("b.txt", ValueError, "must end in .jsonl, .json, .parquet; got"),
        ("no/b.jsonl", FileNotFoundError, "the output's folder must exist; no such folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_read(
    output: str, kind: type[Exception], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(kind, match=message):
        convert(tmp_path / "not there.jsonl", tmp_path / output, to="hh")


# The command ------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> typing.Callable[..., tuple[int, str, str]]:
    """Run `fusedpo convert`; returns (exit code, stdout, stderr)."""
    typer = pytest.importorskip("typer", reason="the command needs the extra cli")
    from fusedpo.cli.command import command as as_command
    from fusedpo.cli.convert import convert as function

    app = typer.Typer()
    app.command()(as_command("convert", function))

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            app([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return typing.cast(int, stop.value.code), shown.out, shown.err

    return run


def test_the_command_tells_by_its_exit_code_whether_all_rows_went_through(
    command: Any, tmp_path: pathlib.Path
) -> None:
    source = write(tmp_path / "a.jsonl", [TEXTS])
    code, out, err = command(source, tmp_path / "b.jsonl", "--to", "hh")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"{source}: 1 row of preference"
    write(source, [TEXTS, {}])
    code, out, _ = command(source, tmp_path / "b.jsonl", "--to", "hh", "--json")
    assert code == 1
    assert json.loads(out)["problems"][0]["line"] == 2
    assert len(values(tmp_path / "b.jsonl")) == 1


def test_the_command_takes_the_form_and_the_template(command: Any, tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.jsonl", [{**TEXTS, "completion": "5", "label": 0}])
    options = ("--from", "kto", "--to", "unpaired", "--template", "chatml")
    code, _, err = command(source, tmp_path / "b.jsonl", *options)
    assert (code, err) == (0, "")
    assert values(tmp_path / "b.jsonl")[0].completion == "5<|im_end|>"


def test_the_command_fails_with_the_reason(command: Any, tmp_path: pathlib.Path) -> None:
    code, out, err = command(tmp_path / "no.jsonl", tmp_path / "b.jsonl", "--to", "hh")
    assert (code, out) == (1, "")
    assert "fusedpo convert: " in err
    assert "no.jsonl" in err
    assert command(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--to", "dpo")[0] == 2


def test_the_command_offers_all_that_there_is() -> None:
    pytest.importorskip("typer", reason="the command needs the extra cli")
    from fusedpo.cli import convert as offered

    assert typing.get_args(offered.Form) == tuple(FORMS)
    assert typing.get_args(offered.Target) == TARGETS
    assert typing.get_args(offered.Template) == RENDERERS
