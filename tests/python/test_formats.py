"""Preference data read from files: which form it is, what each row says, and what is wrong."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any

import pytest
from convert_cases import assistant, user
from formats_cases import CASES, TEXTS, WRONG
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
