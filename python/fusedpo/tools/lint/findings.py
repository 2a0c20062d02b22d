"""What a check tells: findings, each with what to do, and the report that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .statistics import Lengths

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Example:
    """One row that a finding concerns: where it is, and what to look at there."""

    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Finding:
    """What one rule found in a data set.

    Attributes:
        rule: the rule's name.
        severity: "error": do not train on this; "warning": look at it; "note": know it.
        count, of: how many rows are concerned, and of how many.
        what: one or two sentences with the figures.
        advice: what to do.
        examples: a few of the rows, the clearest first.
        lines: of all of them, in that order.
        removable: `fix` removes the rows.
        figures: the numbers of `what`, by name.
    """

    rule: str
    severity: Severity
    count: int
    of: int
    what: str
    advice: str
    examples: tuple[Example, ...] = ()
    lines: tuple[int, ...] = ()
    removable: bool = False
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Removed:
    """One row that `fix` left out, and the rules that asked for it."""

    file: str
    line: int
    rules: tuple[str, ...]


@dataclass(frozen=True)
class Fixed:
    """The cleaned file: its path, how many rows it has, and what was left out."""

    path: str
    rows: int
    removed: tuple[Removed, ...]


@dataclass(frozen=True)
class LintReport:
    """What `lint` found. `failed` is what the command's exit code tells.

    Attributes:
        data, form: the file and the form in which it was read.
        rows: rows that could be read; unreadable ones are a finding.
        findings: errors first, then warnings, then notes.
        lengths: word lengths, and token lengths where a tokenizer was given.
        languages: share of the completions in each language, the most frequent first.
        not_checked: rules that something is missing for, with what it is.
        failed: there is a finding at least as severe as `fail_on`, or the cleaned file could not be
            written.
        fixed: the cleaned file, where one was asked for.
        not_fixed: why it could not be written, else "".
    """

    data: str
    form: str
    rows: int
    findings: tuple[Finding, ...]
    lengths: tuple[Lengths, ...]
    languages: Mapping[str, float]
    not_checked: Mapping[str, str]
    failed: bool
    fixed: Fixed | None = None
    not_fixed: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        return asdict(self)

    def render(self) -> Any:
        """Return a `rich` renderable."""
        from .render import render

        return render(self)

    def finding(self, rule: str) -> Finding | None:
        """Return what that rule found, or None."""
        return next((each for each in self.findings if each.rule == rule), None)
