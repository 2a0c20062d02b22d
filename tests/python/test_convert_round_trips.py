"""`fusedpo convert`: what goes through other forms comes back as it was."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from convert_cases import (
    PAIR,
    assistant,
    conversations,
    pairs,
    texts,
    user,
    values,
)
from fusedpo.tools.convert import convert
from fusedpo.tools.formats import (
    FORMS,
    FormatError,
    LabelledCompletion,
    PreferencePair,
    Row,
    from_record,
    to_record,
)
from fusedpo.tools.pairing import as_labelled, as_pairs
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("form", ["conversational", "sharegpt", "hh"])
@settings(deadline=None)
@given(pair=pairs())
def test_a_pair_is_the_same_after_it_was_written_as(form: str, pair: PreferencePair) -> None:
    record = to_record(pair, form)
    assert [name for name in FORMS if FORMS[name].matches(record)] == [form]
    assert from_record(record, form) == pair


@settings(deadline=None)
@given(pair=pairs(turns=st.sampled_from([1, 3])))
def test_a_pair_of_any_turns_is_the_same_after_hh_or_is_refused(pair: PreferencePair) -> None:
    chosen, rejected = pair.chosen, pair.rejected
    if len(chosen) == 3 and chosen[:2] == rejected[:2]:  # nothing tells it from the prompt
        with pytest.raises(FormatError, match="completions that begin with the same turns"):
            to_record(pair, "hh")
    else:
        assert from_record(to_record(pair, "hh"), "hh") == pair


def test_completions_that_share_their_first_turns_are_no_transcripts() -> None:
    shared = [assistant("Hi."), user("And?")]
    pair = PreferencePair(PAIR.prompt, [*shared, assistant("good")], [*shared, assistant("bad")])
    with pytest.raises(FormatError, match="completions that begin with the same turns"):
        to_record(pair, "hh")
    assert from_record(to_record(pair, "conversational"), "conversational") == pair


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
    left = [rows[problem.line - 1].value for problem in alone]
    for prompt in "ab":
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
