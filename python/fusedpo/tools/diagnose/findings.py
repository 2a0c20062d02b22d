"""What a diagnosis says: findings with their evidence and fixes, and what could not be checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Evidence:
    """A number, and the steps it is of."""

    what: str
    value: float
    first_step: int
    last_step: int

    def __str__(self) -> str:
        return f"{self.what}: {self.value:.4g} ({_steps(self.first_step, self.last_step)})"


def _steps(first: int, last: int) -> str:
    return f"step {last}" if first == last else f"steps {first} to {last}"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run.

    `severity` is "error" where the result is of no use, "warning" where it may be worse than it
    could be.
    """

    rule: str
    severity: Severity
    title: str
    meaning: str
    evidence: tuple[Evidence, ...]
    fixes: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What was found in a run, which rules found nothing, and which could not tell, and why."""

    run: str
    path: str
    last_step: int
    findings: tuple[Finding, ...]
    passed: tuple[str, ...]
    not_checked: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def fails(self, on: Severity | Literal["never"] = "error") -> bool:
        """Whether there is a finding of this severity or a worse one."""
        severities = {finding.severity for finding in self.findings}
        return on != "never" and ("error" in severities or on in severities)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON, which has no NaN and no infinity: those values are strings."""
        report = asdict(self)
        for finding in report["findings"]:
            for each in finding["evidence"]:
                if not math.isfinite(each["value"]):
                    each["value"] = str(each["value"])
        return report

    def render(self) -> str:
        """The written diagnosis."""
        count = len(self.findings)
        found = "nothing found" if not count else f"{count} finding{'s' if count > 1 else ''}"
        lines = [f"{self.run}, {self.last_step} steps: {found}"]
        for finding in self.findings:
            lines += ["", f"{finding.severity}: {finding.title} [{finding.rule}]"]
            lines += [f"  {finding.meaning}"]
            lines += [f"  - {each}" for each in finding.evidence]
            lines += [f"  fix: {each}" for each in finding.fixes]
        lines.append("")
        if self.passed:
            lines.append(f"checked, nothing found: {', '.join(self.passed)}")
        for why in dict.fromkeys(self.not_checked.values()):
            names = [name for name, reason in self.not_checked.items() if reason == why]
            lines.append(f"not checked: {', '.join(names)}: {why}")
        lines += [f"note: {each}" for each in self.notes]
        return "\n".join(lines)
