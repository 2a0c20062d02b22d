"""Preference data read from files: which form it is, what each row says, and what is wrong."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any

import pytest
from fusedpo.tools.formats import (
    FORMS,
    FormatError,
    LabelledCompletion,
    PreferencePair,
    from_record,
    read_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def sharegpt(sender: str, text: str) -> dict[str, str]:
    return {"from": sender, "value": text}


TEXTS = {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}
SUM = PreferencePair([user("2+2?")], [assistant("4")], [assistant("5")])
CHAT = [system("Be brief."), user("Hi"), assistant("Hello."), user("2+2?")]
LONG = PreferencePair(CHAT, [assistant("4")], [assistant("5")])
TRANSCRIPT = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 2+2?\n\nAssistant:"

# name of the case -> (form, record, value)
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "texts": ("preference", TEXTS, PreferencePair(**TEXTS)),
    "messages": (
        "conversational",
        {"prompt": CHAT, "chosen": [assistant("4")], "rejected": [assistant("5")]},
        LONG,
    ),
    "whole conversations": (
        "conversational",
        {"chosen": [*CHAT, assistant("4")], "rejected": [*CHAT, assistant("5")]},
        LONG,
    ),
    "whole conversations, and the question as a text": (
        "conversational",
        {"prompt": "2+2?", "chosen": [user("2+2?"), assistant("4")]}
        | {"rejected": [user("2+2?"), assistant("5")]},
        SUM,
    ),
    "a question as a text, answers as messages": (
        "conversational",
        {"prompt": "2+2?", "chosen": [assistant("4")], "rejected": [assistant("5")]},
        SUM,
    ),
    "whole conversations with a system message, and the question as a text": (
        "conversational",
        {"prompt": "2+2?", "chosen": [*CHAT, assistant("4")], "rejected": [*CHAT, assistant("5")]},
        LONG,
    ),
    "whole conversations, and their prompt again": (
        "conversational",
        {"prompt": CHAT, "chosen": [*CHAT, assistant("4")], "rejected": [*CHAT, assistant("5")]},
        LONG,
    ),
    "messages with a column for the system": (
        "conversational",
        {"system": "Be brief.", "prompt": CHAT[1:], "chosen": [assistant("4")]}
        | {"rejected": [assistant("5")]},
        LONG,
    ),
    "a system message that is there twice": (
        "conversational",
        {"system": "Be brief.", "prompt": CHAT, "chosen": [assistant("4")]}
        | {"rejected": [assistant("5")]},
        LONG,
    ),
    "conversations that part before their end": (
        "conversational",
        {
            "chosen": [user("Hi"), assistant("Hello."), user("2+2?"), assistant("4")],
            "rejected": [user("Hi"), assistant("Hello."), user("3+3?"), assistant("6")],
        },
        PreferencePair(
            [user("Hi")],
            [assistant("Hello."), user("2+2?"), assistant("4")],
            [assistant("Hello."), user("3+3?"), assistant("6")],
        ),
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [
                sharegpt("system", "Be brief."),
                sharegpt("human", "Hi"),
                sharegpt("gpt", "Hello."),
                sharegpt("human", "2+2?"),
            ],
            "chosen": sharegpt("gpt", "4"),
            "rejected": sharegpt("gpt", "5"),
        },
        LONG,
    ),
    "sharegpt with a column for the system": (
        "sharegpt",
        {
            "system": "Be brief.",
            "conversations": [user("Hi"), assistant("Hello."), user("2+2?")],
            "chosen": assistant("4"),
            "rejected": assistant("5"),
        },
        LONG,
    ),
    "transcripts with a column for the system": (
        "hh",
        {"system": "Be brief.", "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4"}
        | {"rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        PreferencePair([CHAT[0], user("2+2?")], [assistant("4")], [assistant("5")]),
    ),
    "transcripts": ("hh", {"chosen": TRANSCRIPT + " 4", "rejected": TRANSCRIPT + " 5"}, LONG),
    "labelled texts": (
        "kto",
        {"prompt": "2+2?", "completion": " 4", "label": True},
        LabelledCompletion("2+2?", " 4", True),
    ),
    "labelled messages": (
        "kto",
        {"prompt": CHAT, "completion": [assistant("5")], "label": 0},
        LabelledCompletion(CHAT, [assistant("5")], False),
    ),
    "labelled messages with a column for the system": (
        "kto",
        {"system": "Be brief.", "prompt": CHAT[1:], "completion": [assistant("5")], "label": 0},
        LabelledCompletion(CHAT, [assistant("5")], False),
    ),
    "a label as pandas writes it": (
        "kto",
        {"prompt": "2+2?", "completion": " 4", "label": 1.0},
        LabelledCompletion("2+2?", " 4", True),
    ),
    "a label as a text of a number": (
        "kto",
        {"prompt": "2+2?", "completion": " 5", "label": "0.0"},
        LabelledCompletion("2+2?", " 5", False),
    ),
    "a labelled conversation": (
        "kto",
        {"messages": [*CHAT, assistant("4")], "label": True},
        LabelledCompletion(CHAT, [assistant("4")], True),
    ),
    "a tagged conversation": (
        "kto",
        {"conversations": [sharegpt("human", "2+2?"), sharegpt("gpt", "5")], "kto_tag": False},
        LabelledCompletion([user("2+2?")], [assistant("5")], False),
    ),
    "an instruction and two answers": (
        "instruction",
        {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
        SUM,
    ),
    "an instruction and a list of answers": (
        "instruction",
        {"system": "Be brief.", "history": [["Hi", "Hello."]], "instruction": "2+2?"}
        | {"output": ["4", "5"]},
        LONG,
    ),
    "an instruction, its input and its output": (
        "instruction",
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        LabelledCompletion([user("Add.\n\n2 2")], [assistant("4")], True),
    ),
    "a labelled output": (
        "instruction",
        {"instruction": "2+2?", "output": "5", "label": False},
        LabelledCompletion([user("2+2?")], [assistant("5")], False),
    ),
}


def write(folder: pathlib.Path, content: Any, name: str = "data.jsonl") -> pathlib.Path:
    """A file with these bytes, or these rows."""
    path = folder / name
    if not isinstance(content, bytes):
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", CASES)
def test_each_form_is_recognised_and_read(case: str, tmp_path: pathlib.Path) -> None:
    form, record, value = CASES[case]
    loaded = read_rows(write(tmp_path, [record]))
    assert (loaded.form, [row.value for row in loaded.rows]) == (form, [value])
    assert (loaded.problems, loaded.not_carried) == ([], {})
    assert (loaded.rows[0].line, loaded.rows[0].record) == (1, record)


def test_every_form_has_a_case() -> None:
    assert {form for form, _, _ in CASES.values()} == set(FORMS)


WRONG = {
    "a text that is not one": (
        "preference",
        {**TEXTS, "chosen": 4},
        "chosen must be a text; got 4",
    ),
    "a missing column": ("preference", {"prompt": "2+2?", "chosen": "4"}, "rejected is missing"),
    "half a surrogate pair": (
        "preference",
        {**TEXTS, "chosen": "a\ud83d"},
        "U+D83D, at character 1",
    ),
    "an unknown role": (
        "conversational",
        {"prompt": [user("a"), {"role": "tool", "content": "b"}], "chosen": [], "rejected": []},
        "prompt[1].role must be one of",
    ),
    "a tool call": (
        "conversational",
        {"prompt": [user("a")], "rejected": [assistant("b")]}
        | {"chosen": [{**assistant(""), "tool_calls": [1]}]},
        "chosen[0] has tool_calls",
    ),
    "content in parts": (
        "conversational",
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}
        | {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        "prompt[0].content must be a text; got a list",
    ),
    "a prompt that ends with the assistant": (
        "conversational",
        {"prompt": [assistant("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        "prompt must end with a user's message",
    ),
    "a completion of the user": (
        "sharegpt",
        {"conversations": [user("a")], "chosen": user("b"), "rejected": assistant("c")},
        "chosen must begin with the assistant's message; got the user's",
    ),
    "nothing chosen": (
        "conversational",
        {"prompt": [user("a")], "chosen": [], "rejected": [assistant("c")]},
        "chosen must have a message",
    ),
    "a system message beside texts": (
        "preference",
        {**TEXTS, "system": "Be brief."},
        "a column system needs a prompt of messages",
    ),
    "a system message beside labelled texts": (
        "kto",
        {"system": "Be brief.", "prompt": "a", "completion": "b", "label": True},
        "a column system needs a prompt of messages",
    ),
    "two system messages": (
        "sharegpt",
        {"system": "Be long.", "conversations": CHAT, "chosen": assistant("4")}
        | {"rejected": assistant("5")},
        "there must be one system message; got one in the column system and another one",
    ),
    "a prompt that the conversations do not begin with": (
        "conversational",
        {"prompt": [user("b")], "chosen": [user("a"), assistant("b")]}
        | {"rejected": [user("a"), assistant("c")]},
        "chosen must begin with the assistant's message; got the user's",
    ),
    "another question": (
        "conversational",
        {"prompt": "b", "chosen": [user("a"), assistant("b")]}
        | {"rejected": [user("a"), assistant("c")]},
        "prompt must repeat one of their messages; got 'b'",
    ),
    "transcripts of two conversations": (
        "hh",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        "must begin with the same turns",
    ),
    "texts without a prompt": ("hh", {"chosen": "a", "rejected": "b"}, "Plain texts need a column"),
    "a label that is neither": (
        "kto",
        {"prompt": "a", "completion": "b", "label": "good"},
        "label must be true or false, or 1 or 0; got 'good'",
    ),
    "a label of 2": ("kto", {"prompt": "a", "completion": "b", "label": 2}, "got 2"),
    "two completions": (
        "kto",
        {"prompt": "a", "completion": "b", "messages": [user("a"), assistant("c")], "label": True},
        "got completion and messages",
    ),
    "no completion": ("kto", {"prompt": "a", "label": True}, "got none"),
    "three answers": ("instruction", {"instruction": "a", "output": ["b", "c", "d"]}, "got 3"),
    "a broken history": (
        "instruction",
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history must be a list of [question, answer]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_record_is_refused_with_the_reason(case: str) -> None:
    form, record, reason = WRONG[case]
    with pytest.raises(FormatError) as refused:
        from_record(record, form)
    assert reason in str(refused.value)


scalars = st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["", "a", "gpt", "user"])
message_like = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value"]), scalars, max_size=3
)
anything = scalars | message_like | st.lists(scalars | message_like, max_size=3)
COLUMNS = sorted({name for _, record, _ in CASES.values() for name in record})


@settings(deadline=None)
@given(
    st.sampled_from(sorted(FORMS)),
    st.sampled_from([record for _, record, _ in CASES.values()]),
    st.dictionaries(st.sampled_from(COLUMNS), anything, max_size=3),
)
def test_any_record_is_read_or_refused_with_a_reason(
    form: str, record: dict[str, Any], changes: dict[str, Any]
) -> None:
    FORMS[form].matches(record | changes)
    with contextlib.suppress(FormatError):
        value = from_record(record | changes, form)
        assert isinstance(value, (PreferencePair, LabelledCompletion))


def test_an_unknown_form_lists_what_was_looked_for(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, [{"question": "2+2?", "answer": "4"}])
    with pytest.raises(FormatError) as refused:
        read_rows(path)
    message = str(refused.value)
    assert "(line 1) has: question, answer" in message
    for form in FORMS.values():
        assert f"{form.name}: {form.looks_like}" in message


def test_a_row_of_two_forms_is_refused_unless_one_is_named(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, [TEXTS | {"completion": " 4", "label": True}])
    with pytest.raises(FormatError, match="got preference or kto in 1, the first in line 1"):
        read_rows(path)
    assert read_rows(path, "kto").rows[0].value == LabelledCompletion("2+2?", " 4", True)
    loaded = read_rows(path, "preference")
    assert loaded.rows[0].value == PreferencePair(**TEXTS)
    assert loaded.not_carried == {"completion": 1, "label": 1}


def test_rows_of_two_forms_are_refused_unless_one_is_named(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, [TEXTS, CASES["sharegpt"][1], TEXTS])
    with pytest.raises(FormatError, match=r"preference in 2, .*sharegpt in 1, the first in line 2"):
        read_rows(path)
    loaded = read_rows(path, "preference")
    assert [row.line for row in loaded.rows] == [1, 3]
    assert loaded.problems[0].line == 2
    assert "the column prompt is missing" in loaded.problems[0].reason


def test_an_unknown_name_of_a_form_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"must be one of preference, .*got 'dpo'"):
        read_rows(write(tmp_path, [TEXTS]), "dpo")


def test_what_a_value_cannot_hold_is_told(tmp_path: pathlib.Path) -> None:
    _, record, _ = CASES["sharegpt"]
    weighted = {**record, "chosen": {**record["chosen"], "weight": 1}, "score": 3, "id": None}
    assert read_rows(write(tmp_path, [record, weighted])).not_carried == {
        "chosen[].weight": 1,
        "score": 1,
    }


@pytest.mark.parametrize(
    ("record", "lost"),
    [
        ({"prompt": "a", "messages": [user("b"), assistant("c")], "label": True}, "prompt"),
        ({"instruction": "a", "output": "b", "rejected": "c"}, "rejected"),
        ({"instruction": "a", "chosen": "b", "rejected": "c", "label": True}, "label"),
        ({"instruction": "a", "output": ["b", "c"], "kto_tag": True}, "kto_tag"),
    ],
)
def test_a_column_of_the_form_that_a_row_does_not_need_is_told(
    record: dict[str, Any], lost: str, tmp_path: pathlib.Path
) -> None:
    assert read_rows(write(tmp_path, [record])).not_carried == {lost: 1}


def test_a_few_rows_of_another_form_or_none_are_problems_and_the_others_are_read(
    tmp_path: pathlib.Path,
) -> None:
    odd = [{"chosen": "4", "rejected": "5"}, CASES["a tagged conversation"][1]]
    loaded = read_rows(write(tmp_path, [TEXTS] * 15 + odd + [TEXTS] * 15))
    assert (loaded.form, len(loaded.rows)) == ("preference", 30)
    assert [problem.line for problem in loaded.problems] == [16, 17]


def test_texts_that_are_no_transcripts_are_of_no_form(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FormatError, match="no known form"):
        read_rows(write(tmp_path, [{"chosen": "4", "rejected": "5"}]))


def test_names_of_columns_send_nothing_to_the_terminal(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FormatError, match=r"has: a\[U\+001B\]\[2J\."):
        read_rows(write(tmp_path, [{"a\x1b[2J": 1}]))


def test_a_value_of_texts_and_messages_is_refused() -> None:
    with pytest.raises(TypeError, match="prompt str, chosen list, rejected list"):
        PreferencePair("a", [assistant("b")], [assistant("c")])
