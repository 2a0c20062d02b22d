"""The report of `fusedpo lint`, its statistics, the cleaned file, and the command."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="tokenizers come from transformers")
pytest.importorskip("rapidfuzz", reason="fusedpo.tools.lint needs the extra tools")

from fusedpo.cli.lint import lint as command
from fusedpo.tools.lint import RULES, Removed, lint
from fusedpo.tools.lint.statistics import length_bias
from lint_cases import CLEAN_TEXTS, A, B, Q, chat, labelled, make_tokenizer, of, pair, write
from rich.console import Console

FAULTY = [
    pair(Q, A, B),
    pair(Q, B, A),  # contradicts the first
    pair("Same?", A, A),
    "not JSON",
    {**pair("Where do bears live?", A, B), "id": 7},
    pair("Where do bears live?", A, B),  # repeats
    pair("Nobody answers.", A, ""),
]


@pytest.fixture
def faulty(tmp_path: pathlib.Path) -> pathlib.Path:
    return write(tmp_path / "faulty.jsonl", FAULTY)


def shown(report: Any) -> str:
    console = Console(width=1000, record=True, file=io.StringIO())
    console.print(report.render() if hasattr(report, "render") else report)
    return console.export_text()


def test_a_report_tells_every_finding_with_its_place_and_remedy(faulty: pathlib.Path) -> None:
    report = lint(faulty)
    text = shown(report)
    assert "6 rows, preference; 4 errors, 1 warning, 2 notes" in text
    for finding in report.findings:
        assert finding.rule in text
        assert finding.advice in text
    assert "faulty.jsonl:4  must be JSON" in text
    assert "faulty.jsonl:6  as line 5" in text
    assert "--tokenizer" in text  # what was not checked


def test_findings_come_by_severity_and_errors_fail(faulty: pathlib.Path) -> None:
    report = lint(faulty)
    order = ["error", "warning", "note"]
    ranks = [order.index(finding.severity) for finding in report.findings]
    assert ranks == sorted(ranks)
    assert report.failed


@pytest.mark.parametrize(
    ("fail_on", "failed"), [("error", False), ("warning", True), ("never", False)]
)
def test_fail_on_says_which_findings_fail(
    fail_on: str, failed: bool, tmp_path: pathlib.Path
) -> None:
    data = write(tmp_path / "data.jsonl", [pair(Q, A, B)] * 2)  # a warning and a note
    assert lint(data, fail_on=fail_on).failed is failed


def test_a_report_is_json(faulty: pathlib.Path) -> None:
    report = lint(faulty, tokenizer=make_tokenizer())
    read = json.loads(json.dumps(report.as_dict()))
    assert read["rows"] == 6
    assert {each["unit"] for each in read["lengths"]} == {"words", "tokens"}
    assert read["findings"][0]["examples"][0]["line"] == 4


def test_texts_with_brackets_are_shown_as_they_are(tmp_path: pathlib.Path) -> None:
    data = write(tmp_path / "data.jsonl", [pair(Q, "[bold]x[/bold]", "[/red]")])
    assert "[/red]" in shown(lint(data))


def test_a_report_sends_no_control_characters_to_the_terminal(tmp_path: pathlib.Path) -> None:
    data = write(tmp_path / "data.jsonl", [pair(Q, "\x1b[2J\u202eevil\u200b", B)])
    text = shown(lint(data))
    assert "[U+001B][2J[U+202E]evil[U+200B]" in text
    assert not set(text) & {"\x1b", "\u202e", "\u200b"}


def test_effect_size_is_cohens_d_of_paired_logs() -> None:
    chosen, rejected = np.array([10, 20, 30, 0]), np.array([5, 20, 10, 9])
    logs = [math.log(2), 0.0, math.log(3)]
    mean = sum(logs) / 3
    deviation = math.sqrt(sum((each - mean) ** 2 for each in logs) / 2)
    bias = length_bias(chosen, rejected)
    assert bias.pairs == 3  # the one with an empty side does not count
    assert bias.effect_size == pytest.approx(mean / deviation)
    assert bias.ratio == pytest.approx(6 ** (1 / 3))
    assert (bias.chosen_longer, bias.rejected_longer) == (pytest.approx(2 / 3), 0.0)


def test_a_bias_without_spread_is_found(tmp_path: pathlib.Path) -> None:
    rows = [pair(f"{Q} {i}", A + A, A) for i in range(12)]  # always exactly twice as long
    finding = lint(write(tmp_path / "data.jsonl", rows)).finding("length_bias")
    assert finding is not None
    assert finding.figures["chosen_longer"] == 1.0


def test_fix_leaves_out_what_is_removable_and_keeps_every_column(
    faulty: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    report = lint(faulty, fix=tmp_path / "clean.jsonl")
    assert report.fixed is not None
    kept = [json.loads(line) for line in (tmp_path / "clean.jsonl").open(encoding="utf-8")]
    assert kept == [{**pair("Where do bears live?", A, B), "id": 7}]
    assert report.fixed.rows == 1
    file = str(faulty)
    assert report.fixed.removed == (
        Removed(file, 1, ("contradicting_pairs",)),
        Removed(file, 2, ("contradicting_pairs",)),
        Removed(file, 3, ("identical_sides",)),
        Removed(file, 4, ("unreadable_rows",)),
        Removed(file, 6, ("duplicate_rows",)),
        Removed(file, 7, ("empty_completions",)),
    )
    assert "rows kept: 1, removed: 6 (contradicting_pairs 2," in shown(report)


def test_a_fixed_file_has_nothing_more_to_remove(
    faulty: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    clean = tmp_path / "clean.json"
    lint(faulty, fix=clean)
    report = lint(clean, fix=tmp_path / "again.json")
    assert report.fixed is not None
    assert report.fixed.removed == ()
    assert not report.failed
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(clean.read_text())


def test_fix_removes_nothing_that_differs_in_white_space_within(tmp_path: pathlib.Path) -> None:
    rows = [
        pair("Indent.", "if a:\n    b", "if a:\nb"),
        pair("Indent.", "if a:\nb", "if a:\n    b c"),
        pair("Indent.", "if a:\nb", "if a:\n        b c"),
        pair("Indent.", "if a:\n        b c", "if a:\n    b"),
    ]
    report = lint(write(tmp_path / "data.jsonl", rows), fix=tmp_path / "clean.jsonl")
    assert report.fixed is not None
    assert report.fixed.removed == ()
    assert {each.rule for each in report.findings} >= {
        "white_space_alone",
        "repeats_but_for_white_space",
    }


def test_who_said_it_is_part_of_a_row(tmp_path: pathlib.Path) -> None:
    rows = [
        chat([("system", "Be kind."), ("user", "Hi")], A, B),
        chat([("user", "Be kind.\n\nHi")], B, A),
        chat([("user", "Be kind."), ("assistant", "Hi"), ("user", "x")], B, A),
        chat([("user", "Be kind."), ("user", "Hi"), ("user", "x")], A, B),
    ]
    report = lint(write(tmp_path / "data.jsonl", rows), fix=tmp_path / "clean.jsonl")
    assert report.fixed is not None
    assert report.fixed.removed == ()
    assert report.finding("duplicate_prompts") is None


@pytest.mark.parametrize(
    ("rows", "name", "reason"),
    [
        ([pair(Q, A, A)], "clean.jsonl", "every row has a finding that removes it"),
        (
            [pair("x", A, A), {**pair(Q, A, B), "note": "a\ud83d"}],
            "clean.json",
            "data.jsonl:2: the column note cannot be written as JSON",
        ),
        (
            [{**pair(Q, A, B), "note": 1}, {**pair("x", A, B), "note": "a"}],
            "clean.parquet",
            "data.jsonl:2: the column note cannot be written as Parquet: 'a'",
        ),
    ],
)
def test_a_copy_that_cannot_be_written_is_told_with_the_report(
    rows: list[Any], name: str, reason: str, tmp_path: pathlib.Path
) -> None:
    report = lint(write(tmp_path / "data.jsonl", rows), fix=tmp_path / name, fail_on="never")
    assert report.fixed is None
    assert report.failed
    assert reason in report.not_fixed
    assert f"{name} was not written: " in shown(report)
    assert ("1 row, preference" if len(rows) == 1 else "2 rows, preference") in shown(report)
    assert not (tmp_path / name).exists()


def test_fix_refuses_the_checked_file_and_other_kinds(faulty: pathlib.Path) -> None:
    before = faulty.read_bytes()
    with pytest.raises(ValueError, match="must not be the input"):
        lint(faulty, fix=faulty)
    with pytest.raises(ValueError, match=r"must end in \.jsonl, \.json"):
        lint(faulty, fix=faulty.with_suffix(".txt"))
    assert faulty.read_bytes() == before


def test_pairs_and_labelled_rows_in_one_file_are_refused(tmp_path: pathlib.Path) -> None:
    rows = [
        {"instruction": "Add 1 and 1.", "output": ["2", "3"]},
        {"instruction": "Add 1 and 1.", "output": "2"},
    ]
    data = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(ValueError, match=r"labelled rows follow in .*data\.jsonl:2"):
        lint(data, form="instruction")


def test_a_file_in_which_nothing_can_be_read_is_reported(tmp_path: pathlib.Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": 1}, {"prompt": 2}])
    report = lint(data, form="preference", tokenizer=make_tokenizer())
    assert report.rows == 0
    assert [(each.rule, each.count, each.of) for each in report.findings] == [
        ("unreadable_rows", 2, 2)
    ]
    assert "unreadable_rows" in shown(report)
    assert report.not_checked == {}


def test_labels_of_one_kind_alone_are_told(tmp_path: pathlib.Path) -> None:
    data = write(tmp_path / "data.jsonl", [labelled(Q, A, True), labelled("Where?", B, True)])
    finding = lint(data).finding("unbalanced_labels")
    assert finding is not None
    assert "no weight helps" in finding.what


def test_a_missing_library_is_named_with_the_extra(
    faulty: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "py3langid" else find_spec(name)
    )
    with pytest.raises(ImportError, match=r'py3langid, .*pip install "fusedpo\[tools\]"'):
        lint(faulty)


def test_the_documents_table_has_every_rule_as_it_is() -> None:
    page = pathlib.Path(__file__).parents[2] / "docs/tools/lint.md"
    table = page.read_text(encoding="utf-8").split("<!-- rules:")[1].split("<!-- /rules -->")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{each.name}` | {each.severity} | {each.about} | {each.advice} |"
        for each in RULES.values()
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fail_on": "note"}, "fail_on must be one of error, warning, never; got 'note'"),
        ({"max_length": 0}, "max_length must be at least 1, or None; got 0"),
        ({"truncation_mode": "middle"}, "must be keep_start or keep_end; got 'middle'"),
    ],
)
def test_bad_options_are_refused(
    options: dict[str, Any], message: str, faulty: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        lint(faulty, **options)


def test_the_command_gives_the_report_and_an_exit_code(
    faulty: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    result = command(str(faulty))
    assert result.code == 1
    assert result.report == lint(faulty).as_dict()
    assert "contradicting_pairs" in shown(result.text)
    clean = write(tmp_path / "clean.jsonl", of("strings", CLEAN_TEXTS))
    make_tokenizer().save_pretrained(tmp_path / "model")
    result = command(str(clean), tokenizer=str(tmp_path / "model"), max_length=40)
    assert result.code == 0
    assert [each["rule"] for each in result.report["findings"]] == []
    assert command(str(clean), max_length=0).report["not_checked"]["cut_by_max_length"] == (
        "needs a tokenizer (--tokenizer) and a limit (--max-length)"
    )
