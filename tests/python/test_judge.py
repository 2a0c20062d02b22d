"""Two orders, the counts that follow from them, and the statistics; with functions as judges."""

from __future__ import annotations

import asyncio
import json
import pathlib
from typing import Any

import judges
import numpy as np
import pytest
from fusedpo.tools.judge import Answer, Comparison, Question, judge, load_function
from fusedpo.tools.judge.statistics import bootstrap, lengths
from misbehaving_server import serve

CODES = {"A": "A", "B": "B", "T": "tie", "-": None}


def comparison(verdicts: str, prompt: str = "p", a: str = "long answer", b: str = "short") -> Any:
    """`verdicts`: with `a` first, then with `b` first."""
    return Comparison(Question(prompt, a, b), *(CODES[code] for code in verdicts))


def answers(*texts: str) -> list[Answer]:
    return [Answer(f"Question {i}?", text) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("verdicts", "outcome"),
    [
        ("AB", "win"),
        ("BA", "loss"),
        ("TT", "tie"),
        ("AA", "flip"),
        ("BB", "flip"),
        ("AT", "half"),
        ("TB", "half"),
        ("BT", "half"),
        ("TA", "half"),
        ("-A", "unparsed"),
        ("A-", "unparsed"),
        ("--", "unparsed"),
    ],
)
def test_only_what_is_said_in_both_orders_counts(verdicts: str, outcome: str) -> None:
    assert comparison(verdicts).outcome == outcome


def test_a_judge_that_prefers_the_first_answer_flips_always_and_gives_no_win() -> None:
    report = judge(answers("a", "bb", "c"), answers("x", "y", "zzz"), judge=judges.first)
    assert report.flip_rate == 1.0
    assert (report.wins, report.losses, report.ties, report.flips) == (0, 0, 3, 3)
    assert report.win_rate == 0.5
    assert "flip rate 100.0 %" in report.render()


def test_counts_lengths_and_rates_of_a_judge_that_prefers_length() -> None:
    a = answers("long one", "s", "same", "equal length", "xx")
    b = answers("short", "much longer", "same", "equal LENGTH", "x")
    report = judge(a, b, judge=judges.longer)
    assert (report.wins, report.losses, report.ties, report.unparsed) == (2, 1, 2, 0)
    assert (report.identical, report.flips, report.halves) == (1, 0, 0)
    assert report.win_rate == (2 + 2 / 2) / 5
    assert report.flip_rate == 0.0
    assert report.asked == 8  # nobody is asked about the identical ones
    assert report.lengths.winners == (8 + 11 + 2) / 3
    assert report.lengths.losers == (5 + 1 + 1) / 3
    assert report.lengths.longer_won == 1.0
    assert report.lengths.a == (8 + 1 + 4 + 12 + 2) / 5
    json.dumps(report.as_dict())
    assert "unparsed 0" in report.render()


def test_the_other_side_sees_the_opposite() -> None:
    a, b = answers("a", "bbb", "c", "dd"), answers("x", "y", "zzz", "d")
    one, other = judge(a, b, judge=judges.longer), judge(b, a, judge=judges.longer)
    assert (one.wins, one.losses, one.ties) == (other.losses, other.wins, other.ties)
    assert one.win_rate == 1 - other.win_rate
    assert one.lengths.winners == other.lengths.winners


def test_the_interval_is_seeded_and_covers_the_rate() -> None:
    outcomes = [comparison("AB" if i % 3 else "BA", prompt=str(i)) for i in range(60)]
    few = [bootstrap(outcomes, resamples=50, seed=seed) for seed in (1, 1, 2)]
    assert few[0] == few[1] != few[2]
    one = bootstrap(outcomes, resamples=4000, seed=1)
    assert one is not None
    # The normal approximation, of a share of 2/3 over 60 prompts.
    half = 1.96 * np.sqrt(2 / 9 / 60)
    assert one.low == pytest.approx(2 / 3 - half, abs=0.02)
    assert one.high == pytest.approx(2 / 3 + half, abs=0.02)


def test_prompts_are_resampled_and_not_answers() -> None:
    # Ten answers to a prompt that agree say no more than one.
    many = [
        comparison("AB" if i % 2 else "BA", prompt=str(i)) for i in range(20) for _ in range(10)
    ]
    once = [comparison("AB" if i % 2 else "BA", prompt=str(i)) for i in range(20)]
    assert bootstrap(many, resamples=2000, seed=0) == bootstrap(once, resamples=2000, seed=0)


def test_there_is_no_interval_for_a_single_prompt() -> None:
    assert bootstrap([comparison("AB")] * 5, resamples=100, seed=0) is None


def test_longer_answers_of_undecided_comparisons_do_not_count() -> None:
    found = lengths([comparison("AA"), comparison("BA", a="four", b="twelve chars")])
    assert (found.winners, found.losers, found.longer_won) == (12, 4, 1.0)
    assert lengths([comparison("AA")]).winners is None


def test_samples_of_one_prompt_are_matched_in_their_order() -> None:
    seen = []

    def note(prompt: str, first: str, second: str) -> str:
        seen.append((first, second))
        return "tie"

    a = [Answer("p", "a0"), Answer("q", "a"), Answer("p", "a1")]
    b = [Answer("p", "b0"), Answer("p", "b1"), Answer("q", "b")]
    judge(a, b, judge=note)
    assert {("a0", "b0"), ("b0", "a0"), ("a1", "b1"), ("a", "b")} <= set(seen)
    assert len(seen) == 6


def test_messages_are_shown_as_text() -> None:
    system, user = {"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}
    seen = set()

    def note(prompt: str, first: str, second: str) -> str:
        seen.add((prompt, first, second))
        return "tie"

    reply = [{"role": "assistant", "content": "Hello"}]
    judge([Answer([system, user], reply)], [Answer([system, user], "Hey")], judge=note)
    assert ("system: Be.\n\nuser: Hi", "Hello", "Hey") in seen


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (answers("x", "y"), answers("x"), "first has 1 answers without a partner.*Question 1"),
        (answers("x"), answers("x", "y"), "second has 1 answers without a partner"),
        (answers("x") * 2, answers("x"), "such as answer 2 to 'Question 0"),
        ([], [], "at least one answer"),
    ],
)
def test_answers_without_a_partner_are_refused(a: Any, b: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        judge(a, b, judge=judges.first)


@pytest.mark.parametrize(
    ("line", "number"),
    [('{"prompt": "p"}', 2), ("nonsense", 2), ('{"prompt": "p", "completion": 3}', 2), ("[1]", 2)],
)
def test_a_line_that_is_no_answer_is_named(tmp_path: pathlib.Path, line: str, number: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:{number} must be"):
        judge(path, path, judge=judges.first)


def test_every_comparison_is_written(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "all.jsonl"
    judge(answers("a\u2028b"), answers("x"), judge=judges.longer, output=output)
    with output.open(encoding="utf-8") as file:
        (row,) = map(json.loads, file)
    assert row == {
        "prompt": "Question 0?",
        "a": "a\u2028b",
        "b": "x",
        "a_first": "A",
        "b_first": "B",
        "outcome": "win",
    }


def test_an_output_that_cannot_be_is_refused_before_anything_is_asked(
    tmp_path: pathlib.Path,
) -> None:
    def nobody(prompt: str, first: str, second: str) -> str:
        raise AssertionError("nobody is to be asked")

    a, b, cache = (tmp_path / f"{name}.jsonl" for name in ("a", "b", "cache"))
    for path in (a, b):
        path.write_text(json.dumps({"prompt": "p", "completion": path.name}) + "\n")
    before = a.read_bytes()
    for output, name in ((a, "a"), (tmp_path / "x" / ".." / "b.jsonl", "b"), (cache, "cache")):
        with pytest.raises(ValueError, match=f"another file than {name};"):
            judge(a, b, judge=nobody, cache=cache, output=output)
    with pytest.raises(ValueError, match="is a folder"):
        judge(a, b, judge=nobody, output=tmp_path)
    assert a.read_bytes() == before
    with pytest.raises(OSError, match=r"a\.jsonl"):
        judge(a, b, judge=nobody, output=a / "under a file" / "out.jsonl")


def test_an_output_may_be_in_a_new_folder_and_hold_any_text(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "new" / "all.jsonl"
    judge(answers("a\ud800"), answers("x"), judge=judges.longer, output=output)
    assert json.loads(output.read_text())["a"] == "a\ud800"


def test_a_template_without_a_place_for_the_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must contain \{first\}, \{second\}"):
        judge(answers("a"), answers("b"), judge=judges.first, template="{prompt}?")


def test_a_template_that_nobody_is_asked_with_is_refused() -> None:
    with pytest.raises(ValueError, match="the judge is a function"):
        judge(answers("a"), answers("b"), judge=judges.first, template="{prompt}{first}{second}")


def test_a_function_is_found_by_its_name() -> None:
    assert load_function("judges:longer") is judges.longer


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("judges", ValueError, "module:function"),
        ("judges:", ValueError, "module:function"),
        ("judges:nothing", ImportError, "no function 'nothing'"),
        ("judges:NOT_A_FUNCTION", ImportError, "no function"),
        ("no_such_module:f", ImportError, "no_such_module"),
    ],
)
def test_a_name_that_names_no_function_is_an_error(name: str, error: Any, told: str) -> None:
    with pytest.raises(error, match=told):
        load_function(name)


def test_a_function_that_returns_no_text_is_an_error() -> None:
    with pytest.raises(TypeError, match="number returned 1"):
        judge(answers("a"), answers("b"), judge=judges.number)


def test_a_notebook_whose_loop_runs_can_judge() -> None:
    pytest.importorskip("httpx")
    from fusedpo.tools.judge import Endpoint

    async def cell(url: str) -> int:
        found = judge(answers("a"), answers("b"), judge=Endpoint(url, "m"))
        return found.flips

    with serve() as server:
        assert asyncio.run(cell(server.url)) == 1
