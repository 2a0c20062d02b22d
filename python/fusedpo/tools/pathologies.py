"""What a model learns from preferences though nobody wanted it: long answers, flattery, evasion,
hedging, repetition, text that is none. Counted, with the evidence."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fusedpo.tools.generate import Generation
from fusedpo.tools.generations import prompt_key
from fusedpo.tools.patterns import Patterns, load_patterns
from fusedpo.tools.text_checks import degenerate, repetition, words_of

Completion = str | Generation


@dataclass(frozen=True)
class Finding:
    """One pathology of one completion: which completion (its place), which check, and why."""

    place: int
    check: str
    evidence: str


@dataclass(frozen=True)
class PathologyReport:
    """How many of the completions have which pathology; one may have several.

    Attributes:
        completions: how many were checked.
        counts: completions by check; verbosity is there only with a reference.
        findings: each one, with its evidence.
        mean_characters: the mean length of a completion.
        length_ratio: that, relative to the reference's answers to the same prompts; None without.
        reference_characters: the mean length of those answers; None without.
        truncated: completions that were cut before the model ended them; their length says less.
    """

    completions: int
    counts: dict[str, int]
    findings: tuple[Finding, ...]
    mean_characters: float
    length_ratio: float | None
    reference_characters: float | None
    truncated: int

    def share(self, check: str) -> float:
        return self.counts[check] / self.completions

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"findings": [asdict(each) for each in self.findings]}

    def render(self) -> Any:
        """Return what `rich` prints: each check with its count, share and first evidence."""
        from rich.console import Group
        from rich.table import Table

        ratio = "" if self.length_ratio is None else f", {self.length_ratio:.2f}x the reference's"
        cut = f", {self.truncated} cut" if self.truncated else ""
        title = (
            f"{self.completions} completions of {self.mean_characters:.0f} characters on average"
            f"{ratio}{cut}"
        )
        table = Table(box=None, pad_edge=False)
        table.add_column("pathology")
        table.add_column("completions", justify="right")
        table.add_column("share", justify="right")
        table.add_column("for example")
        first = {each.check: each for each in reversed(self.findings)}
        for check, count in self.counts.items():
            example = f"{first[check].place}: {first[check].evidence}" if count else ""
            table.add_row(check, str(count), f"{self.share(check):.1%}", _plain(example))
        return Group(title, table)


def check(
    completions: Sequence[Completion],
    reference: Sequence[Completion] | None = None,
    patterns: str | os.PathLike[str] | Patterns | None = None,
) -> PathologyReport:
    """Look for pathologies in completions.

    Args:
        completions: texts, or generations.
        reference: what the reference model answered, for verbosity: generations for the same
            prompts (several for a prompt are averaged), or as many texts in the same order.
        patterns: a file that extends `patterns.yaml`.

    Raises:
        ValueError: no completions, a prompt without a reference, or a patterns file that is none.

    >>> report = check(["Great question! It is 4.", "It is 4."])
    >>> report.counts["flattery"], report.findings[0].evidence
    (1, 'Great question')
    """
    if not completions:
        raise ValueError("completions must hold at least one text; got none.")
    known = patterns if isinstance(patterns, Patterns) else load_patterns(patterns)
    texts = [_text(each) for each in completions]
    expected = None if reference is None else _expected_lengths(completions, reference)
    counts = {} if expected is None else {"verbosity": 0}
    counts |= {each.name: 0 for each in known.phrases} | {"repetition": 0, "degenerate": 0}
    findings = []
    for place, text in enumerate(texts):
        length = None if expected is None else expected[place]
        for name, evidence in _examine(text, length, known):
            counts[name] += 1
            findings.append(Finding(place, name, evidence))
    characters = sum(map(len, texts))
    return PathologyReport(
        completions=len(texts),
        counts=counts,
        findings=tuple(findings),
        mean_characters=characters / len(texts),
        length_ratio=None if expected is None else characters / max(sum(expected), 1.0),
        reference_characters=None if expected is None else sum(expected) / len(texts),
        truncated=sum(isinstance(each, Generation) and each.truncated for each in completions),
    )


def _examine(text: str, expected: float | None, known: Patterns) -> list[tuple[str, str]]:
    limits = known.limits
    found = []
    if expected is not None and len(text) > limits.verbosity_ratio * max(expected, 1.0):
        found.append(("verbosity", f"{len(text)} characters; the reference {expected:.0f}"))
    words = len(words_of(text))
    for phrases in known.phrases:
        matches = phrases.find(text, words, limits.start_characters)
        if matches:
            found.append((phrases.name, "; ".join(matches)))
    for name, why in (
        ("repetition", repetition(text, limits)),
        ("degenerate", degenerate(text, limits)),
    ):
        if why is not None:
            found.append((name, why))
    return found


def _expected_lengths(
    completions: Sequence[Completion], reference: Sequence[Completion]
) -> list[float]:
    """The reference's mean length for each completion, in characters: two models' tokens need not
    be the same."""
    with_prompts = [isinstance(each, Generation) for each in (*completions, *reference)]
    if not all(with_prompts):
        if any(with_prompts) or len(completions) != len(reference):
            raise ValueError(
                "completions and reference must both be generations, or texts in the same order, "
                f"as many of one as of the other; got {len(completions)} and {len(reference)}."
            )
        return [float(len(_text(each))) for each in reference]
    lengths = defaultdict(list)
    for each in reference:
        assert isinstance(each, Generation)
        lengths[prompt_key(each.prompt)].append(len(each.completion))
    expected = []
    for place, each in enumerate(completions):
        assert isinstance(each, Generation)
        known = lengths.get(prompt_key(each.prompt))
        if known is None:
            raise ValueError(
                f"the reference must have an answer to every prompt; none to completion {place}'s. "
                "Generate both from the same prompts."
            )
        expected.append(sum(known) / len(known))
    return expected


def _text(completion: Completion) -> str:
    return completion.completion if isinstance(completion, Generation) else completion


def _plain(text: str) -> Any:
    """Shortened, and no markup: completions may hold square brackets."""
    from rich.text import Text

    text = "".join(c if c.isprintable() else " " for c in text)
    return Text(text if len(text) <= 60 else text[:57] + "...")
