"""Every rule of `fusedpo lint` finds data that was made for it, and leaves data on the border."""

from __future__ import annotations

import pathlib
import pkgutil
import time
from importlib import import_module
from typing import Any

import pytest

pytest.importorskip("transformers", reason="tokenizers come from transformers")
pytest.importorskip("rapidfuzz", reason="fusedpo.tools.lint needs the extra tools")

from fusedpo.tools.lint import RULES, LintReport, Rule, lint, rules
from fusedpo.tools.lint.rules.cycles import _in_circles
from lint_cases import CASES, CLEAN_TEXTS, Case, make_tokenizer, of, write


def check(folder: pathlib.Path, case: Case, rows: Any) -> LintReport:
    tokenizer = None if case.tokenizer is None else make_tokenizer(**case.tokenizer)
    data = write(folder / "data.jsonl", [*of(case.kind, CLEAN_TEXTS), *rows])
    return lint(data, tokenizer=tokenizer, **case.options)


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(RULES)


def test_every_rule_that_was_written_is_run() -> None:
    modules = [
        import_module(f"{rules.__name__}.{m.name}") for m in pkgutil.iter_modules(rules.__path__)
    ]
    written = {v.name for module in modules for v in vars(module).values() if isinstance(v, Rule)}
    assert written == set(RULES)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_every_rule_says_what_it_is_and_what_to_do(rule: Rule) -> None:
    assert rule.about.endswith(".")
    assert rule.advice.endswith(".")


@pytest.mark.parametrize("name", CASES)
def test_a_rule_finds_its_fault(name: str, tmp_path: pathlib.Path) -> None:
    case = CASES[name]
    finding = check(tmp_path, case, case.faulty).finding(name)
    assert finding is not None
    assert finding.severity == RULES[name].severity
    assert finding.count == (len(case.faulty) if case.found is None else case.found)
    if case.found is None and name != "other_columns":  # a finding about columns has no rows
        first = len(of(case.kind, CLEAN_TEXTS)) + 1
        assert sorted(finding.lines) == list(range(first, first + len(case.faulty)))
        assert finding.examples[0].line == finding.lines[0]


@pytest.mark.parametrize("name", CASES)
def test_a_rule_leaves_data_on_the_border_alone(name: str, tmp_path: pathlib.Path) -> None:
    case = CASES[name]
    assert check(tmp_path, case, case.clean).finding(name) is None


def test_a_long_circle_takes_time_in_proportion() -> None:
    answers = [(("", str(number)),) for number in range(5_000)]
    circle = {*zip(answers, [*answers[1:], answers[0]], strict=True)}
    before = time.process_time()
    assert _in_circles(circle | {(answers[0], (("", "outside"),))}) == circle
    assert time.process_time() - before < 2  # a search from every answer took ten times that


@pytest.mark.parametrize("kind", ["strings", "messages", "labels"])
def test_clean_data_has_no_finding(kind: str, tmp_path: pathlib.Path) -> None:
    data = write(tmp_path / "data.jsonl", of(kind, CLEAN_TEXTS))
    report = lint(data, tokenizer=make_tokenizer())
    assert report.findings == ()
    assert not report.failed
    assert report.not_checked == {}
