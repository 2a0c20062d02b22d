"""How a report is shown on a terminal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fusedpo.tools.formats.display import printable, rows

from .findings import Finding, Fixed, LintReport, Severity
from .statistics import Lengths

_STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_LANGUAGES_SHOWN = 6


def render(report: LintReport) -> Any:
    """Return a `rich` renderable of a report."""
    from rich.console import Group

    counts = Counter(each.severity for each in report.findings)
    told = ", ".join(
        f"{counts[severity]} {severity}{'' if counts[severity] == 1 else 's'}"
        for severity in _STYLES
        if counts[severity]
    )
    parts: list[Any] = [
        f"{report.data}: {rows(report.rows)}, {report.form}; {told or 'no finding'}"
    ]
    parts += [_length_table(report.lengths), *_biases(report.lengths), _languages(report)]
    if report.findings:
        parts.append(_finding_table(report.findings))
    parts += _not_checked(report)
    if report.fixed is not None:
        parts.append(_fixed(report.fixed))
    parts.append(printable(report.not_fixed))
    return Group(*(_plain(part) if isinstance(part, str) else part for part in parts if part))


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)  # not markup: texts of the data have brackets


def _length_table(lengths: Sequence[Lengths]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("length")
    for name in ("mean", "median", "95 %", "max"):
        table.add_column(name, justify="right")
    for each in lengths:
        for name, column in each.columns.items():
            figures = (column.mean, column.median, column.p95, column.max)
            table.add_row(f"{name}, {each.unit}", *(f"{figure:,.0f}" for figure in figures))
    return table


def _biases(lengths: Sequence[Lengths]) -> list[str]:
    return [
        f"chosen / rejected in {each.unit}: ratio {bias.ratio:.2f}, chosen longer "
        f"{bias.chosen_longer:.0%}, rejected longer {bias.rejected_longer:.0%}, effect size "
        f"{bias.effect_size:+.2f}"
        for each in lengths
        if (bias := each.bias) is not None
    ]


def _languages(report: LintReport) -> str:
    shown = [
        f"{code or 'short or unclear'} {share:.1%}"
        for code, share in list(report.languages.items())[:_LANGUAGES_SHOWN]
    ]
    more = len(report.languages) - len(shown)
    return (
        "languages of completions: " + ", ".join(shown) + (f" and {more} more" if more > 0 else "")
    )


def _finding_table(findings: Sequence[Finding]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False, show_lines=False)
    table.add_column("finding", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("what, what to do, where", ratio=1)
    for each in findings:
        name = Text(each.severity, style=_STYLES[each.severity])
        name.append(f"\n{each.rule}", style="default not bold")
        share = each.count / each.of if each.of else 0.0
        text = Text(each.what + "\n")
        text.append(f"→ {each.advice}", style="italic")
        for example in each.examples:
            where = f"{os.path.basename(example.file)}:{example.line}"
            text.append(f"\n{where}", style="dim").append(f"  {example.text}")
        table.add_row(name, f"{each.count}\n{share:.1%}", text)
        table.add_section()
    return table


def _not_checked(report: LintReport) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in report.not_checked.items():
        reasons.setdefault(reason, []).append(name)
    return [f"not checked: {', '.join(names)} ({reason})" for reason, names in reasons.items()]


def _fixed(fixed: Fixed) -> str:
    counts = Counter(rule for each in fixed.removed for rule in each.rules)
    by_rule = ", ".join(f"{rule} {count}" for rule, count in counts.most_common())
    told = f" ({by_rule})" if by_rule else ""
    return f"{fixed.path}: rows kept: {fixed.rows}, removed: {len(fixed.removed)}{told}"
