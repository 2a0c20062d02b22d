"""`diagnose`: what is wrong with a run, by what it logged."""

from __future__ import annotations

import os

from ..pair_scores import PairScores
from ..run_facts import find_beta, has_reference, start_loss
from ..runs import Run, read_run
from . import generalisation, learning, length, policy, stability  # noqa: F401  they fill RULES
from .evidence import CannotTell, Case
from .findings import Diagnosis, Evidence, Finding
from .registry import RULES

__all__ = ["RULES", "Diagnosis", "Evidence", "Finding", "diagnose"]


def diagnose(
    run: str | os.PathLike[str] | Run,
    *,
    beta: float | None = None,
    pairs: PairScores | None = None,
) -> Diagnosis:
    """Look for what usually goes wrong, and say for each finding the evidence and the fix.

    Args:
        run: a run of any trainer of TRL: its folder, a checkpoint, a trainer_state.json, or what
            `fusedpo.tools.runs.read_run` returned.
        beta: of the run, where no training_args.bin was saved with it.
        pairs: margins and lengths of single pairs (`fusedpo.tools.pair_scores.score_pairs`), which
            the rule of length exploitation needs.

    Returns:
        Diagnosis: findings, the rules that found none, and those that could not tell, with what
        they need.

    Raises:
        FileNotFoundError, ValueError: there is no such run, or beta is not positive.

    Example:

        report = diagnose("dpo_output")
        print(report.render())
    """
    if beta is not None and not beta > 0:
        raise ValueError(f"beta must be positive; got {beta}")
    read = run if isinstance(run, Run) else read_run(run)
    case = Case(
        run=read,
        beta=find_beta(read) if beta is None else beta,
        start_loss=start_loss(read),
        has_reference=has_reference(read),
        pairs=pairs,
    )
    findings, passed, not_checked = [], [], {}
    for name, rule in RULES.items():
        try:
            finding = rule(case)
        except CannotTell as reason:
            not_checked[name] = str(reason)
            continue
        if finding is None:
            passed.append(name)
        else:
            findings.append(finding)
    findings.sort(key=lambda finding: finding.severity)  # errors first
    return Diagnosis(
        run=read.name,
        path=str(read.path),
        last_step=read.last_step,
        findings=tuple(findings),
        passed=tuple(passed),
        not_checked=not_checked,
        notes=(read.arguments_problem,) if read.arguments_problem else (),
    )
