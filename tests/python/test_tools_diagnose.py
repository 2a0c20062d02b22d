"""`fusedpo.tools.diagnose`: each rule finds the fault that it is for, and not what only looks like
it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from diagnosis_cases import CASES, Log, pair_scores, with_values
from fusedpo.tools.diagnose import RULES, Diagnosis, diagnose
from run_logs import healthy_margin, simulate, write_run


def examine(log: Log, folder: pathlib.Path) -> Diagnosis:
    return diagnose(write_run(folder / "run", log.entries), beta=log.beta, pairs=log.pairs)


def found(report: Diagnosis) -> set[str]:
    return {finding.rule for finding in report.findings}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_finds_its_fault_and_little_else(rule: str, tmp_path: pathlib.Path) -> None:
    case = CASES[rule]  # a rule without a case fails here
    report = examine(case.faulty, tmp_path)
    assert rule in found(report)
    assert found(report) <= {rule} | case.along
    finding = next(each for each in report.findings if each.rule == rule)
    assert finding.evidence
    assert finding.fixes
    text = report.render()
    for part in (finding.title, *finding.fixes, *map(str, finding.evidence)):
        assert part in text


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_passes_what_only_comes_close(rule: str, tmp_path: pathlib.Path) -> None:
    report = examine(CASES[rule].clean, tmp_path)
    assert rule in report.passed, report.render()


def test_no_case_is_left_of_a_rule_that_is_gone() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize(
    ("value", "steps"), [("nan", {30}), ("inf", {99, 100}), ("inf", set(range(1, 101)))]
)
def test_norms_that_stay_infinite_or_are_no_numbers_are_a_fault(
    value: str, steps: set[int], tmp_path: pathlib.Path
) -> None:
    log = Log(with_values(simulate(), "grad_norm", float(value), steps))
    (finding,) = [each for each in examine(log, tmp_path).findings if each.rule == "not_finite"]
    assert finding.evidence[0].first_step == min(steps)


def test_a_healthy_run_passes_every_rule(tmp_path: pathlib.Path) -> None:
    report = examine(Log(simulate(), pairs=pair_scores(0.0)), tmp_path)
    assert set(report.passed) == set(RULES), report.render()
    assert not report.findings


def test_evidence_is_the_mean_of_the_steps_that_it_names(tmp_path: pathlib.Path) -> None:
    entries = CASES["loss_stuck_at_start"].faulty.entries
    report = diagnose(write_run(tmp_path / "run", entries))
    evidence = report.findings[0].evidence[0]
    assert (evidence.first_step, evidence.last_step) == (81, 100)
    losses = [each["loss"] for each in entries if "loss" in each and 81 <= each["step"] <= 100]
    assert evidence.value == pytest.approx(np.mean(losses))


def test_why_the_loss_is_stuck_decides_the_fix(tmp_path: pathlib.Path) -> None:
    entries = CASES["loss_stuck_at_start"].faulty.entries
    steps = {each["step"] for each in entries}

    def fix(name: str, log: list[dict[str, Any]]) -> str:
        return diagnose(write_run(tmp_path / name, log)).findings[0].fixes[0]

    assert "learning_rate tenfold" in fix("slow", entries)
    assert "frozen" in fix("frozen", with_values(entries, "grad_norm", 0.0, steps))
    exact = with_values(entries, "rewards/margins", 0.0, steps)
    assert "same object" in fix("same", exact)


def test_divergence_is_an_error_and_a_loss_that_rises_again_a_warning(
    tmp_path: pathlib.Path,
) -> None:
    def severity(end: float) -> str:
        log = simulate(margin=lambda done: 5 * done if done < 0.5 else 2.5 - end * (done - 0.5))
        report = diagnose(write_run(tmp_path / str(end), log))
        return next(each for each in report.findings if each.rule == "loss_rises").severity

    assert severity(4.5) == "warning"  # ends at a margin of 0.25
    assert severity(9.0) == "error"


def test_the_gap_between_longer_and_shorter_pairs_counts_without_a_correlation(
    tmp_path: pathlib.Path,
) -> None:
    scores = pair_scores(0.0, count=400)
    sign = np.sign(scores.chosen_lengths - scores.rejected_lengths)
    margins = np.where(sign > 0, 0.2, -0.05) + 1e-3 * scores.margins
    margins[:8] = [30, -30, 28, -28, 26, -26, 24, -24]  # a few large ones hide the correlation
    skewed = type(scores)(margins, scores.chosen_lengths, scores.rejected_lengths)
    report = examine(Log(simulate(), pairs=skewed), tmp_path)
    assert found(report) == {"length_exploitation"}
    assert abs(report.findings[0].evidence[0].value) < 0.5


def test_a_model_that_prefers_short_completions_is_told_apart(tmp_path: pathlib.Path) -> None:
    report = examine(Log(simulate(), pairs=pair_scores(-0.05)), tmp_path)
    assert "prefers the shorter" in report.findings[0].title


def test_rules_say_what_they_need(tmp_path: pathlib.Path) -> None:
    losses = [{"loss": 2.0 - step / 100, "step": step} for step in range(1, 21)]  # an SFT run
    report = diagnose(write_run(tmp_path / "sft", losses))
    assert report.passed == ("not_finite", "loss_rises")
    needs = report.not_checked
    assert "eval_dataset" in needs["eval_loss_rises"]
    assert "loss_type" in needs["loss_stuck_at_start"]
    assert "rewards/chosen" in needs["chosen_logps_fall"]
    assert "--data" in needs["length_exploitation"]
    for why in set(needs.values()):
        assert why in report.render()

    few = [each for each in simulate() if each["step"] <= 6]
    report = diagnose(write_run(tmp_path / "few", few))
    assert "needs 8 values; got 6" in report.not_checked["chosen_logps_fall"]


def test_beta_is_measured_from_evaluations_or_asked_for(tmp_path: pathlib.Path) -> None:
    log = simulate(beta=0.01)
    report = diagnose(write_run(tmp_path / "evaluated", log))
    finding = next(each for each in report.findings if each.rule == "beta_too_low")
    assert "beta = 0.01 " in finding.title

    trained = [each for each in log if "loss" in each]
    report = diagnose(write_run(tmp_path / "only trained", trained))
    assert "--beta" in report.not_checked["beta_too_low"]
    assert "beta_too_low" in found(diagnose(tmp_path / "only trained", beta=0.01))
    with pytest.raises(ValueError, match="beta must be positive; got -1"):
        diagnose(tmp_path / "only trained", beta=-1.0)


def test_rewards_without_a_reference_are_not_taken_for_log_ratios(tmp_path: pathlib.Path) -> None:
    log = simulate(beta=0.01)
    free = [
        each | {f"rewards/{side}": 0.01 * each[f"logps/{side}"] for side in ("chosen", "rejected")}
        for each in log
        if "loss" in each
    ]
    report = diagnose(write_run(tmp_path / "free", free), beta=0.01)
    assert "relative to a reference" in report.not_checked["beta_too_low"]


def test_a_report_is_json_also_with_nan(tmp_path: pathlib.Path) -> None:
    report = examine(CASES["not_finite"].faulty, tmp_path).as_dict()
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text)["findings"][0]["evidence"][0]["value"] == "nan"
    assert set(report["not_checked"]) == {"length_exploitation"}


def test_few_or_equal_pairs_are_no_evidence(tmp_path: pathlib.Path) -> None:
    report = examine(Log(simulate(), pairs=pair_scores(0.05, count=20)), tmp_path)
    assert "needs 30 pairs; got 20" in report.not_checked["length_exploitation"]
    scores = pair_scores(0.05)
    same = type(scores)(scores.margins, scores.chosen_lengths, scores.chosen_lengths)
    report = examine(Log(simulate(), pairs=same), tmp_path)
    assert "differ from pair to pair" in report.not_checked["length_exploitation"]


def test_the_documentation_has_every_rule() -> None:
    page = pathlib.Path(__file__).parents[2] / "docs" / "tools" / "diagnose.md"
    table = page.read_text(encoding="utf-8")
    assert [name for name in RULES if f"| `{name}` |" not in table] == []


def test_healthy_margins_stay_healthy_with_any_logging_interval(tmp_path: pathlib.Path) -> None:
    for steps in (10, 50, 400):
        log = simulate(steps=steps, margin=healthy_margin)
        assert not diagnose(write_run(tmp_path / str(steps), log), beta=0.1).findings
