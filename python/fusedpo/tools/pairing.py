"""Pairs as single completions with a label, and back: what KTO's data and DPO's data share."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .formats import LabelledCompletion, PreferencePair, Problem, Row, Text


def as_labelled(rows: Sequence[Row]) -> list[Row]:
    """Return two rows for each pair, chosen (true) before rejected (false)."""
    result = []
    for row in rows:
        value = row.value
        if isinstance(value, PreferencePair):
            for completion, label in ((value.chosen, True), (value.rejected, False)):
                labelled = LabelledCompletion(value.prompt, completion, label)
                result.append(replace(row, value=labelled))
        else:
            result.append(row)
    return result


def as_pairs(rows: Sequence[Row]) -> tuple[list[Row], list[Problem]]:
    """Return pairs of a true and a false completion of one prompt, and what has no partner.

    Each completion is in one pair at most: the first true one goes with the first false one. A pair
    stands where the earlier of its rows stood.
    """
    waiting: defaultdict[str, _Waiting] = defaultdict(_Waiting)
    paired: list[tuple[int, Row]] = []
    for index, row in enumerate(rows):
        value = row.value
        if isinstance(value, PreferencePair):
            paired.append((index, row))
            continue
        same_prompt = waiting[_key(value.prompt)]
        partners = same_prompt.rejected if value.label else same_prompt.chosen
        if not partners:
            (same_prompt.chosen if value.label else same_prompt.rejected).append((index, row))
            continue
        first, partner = partners.popleft()
        good, bad = (row, partner) if value.label else (partner, row)
        paired.append((first, replace(partner, value=_pair(good, bad))))
    alone = [each for held in waiting.values() for each in (*held.chosen, *held.rejected)]
    return [row for _, row in sorted(paired, key=lambda each: each[0])], [
        _without_partner(row) for _, row in sorted(alone, key=lambda each: each[0])
    ]


@dataclass
class _Waiting:
    """Rows of one prompt without a partner yet, each with its index; one of the two is empty."""

    chosen: deque[tuple[int, Row]] = field(default_factory=deque)
    rejected: deque[tuple[int, Row]] = field(default_factory=deque)


def _key(prompt: Text) -> str:
    return json.dumps(prompt)


def _pair(good: Row, bad: Row) -> PreferencePair:
    assert isinstance(good.value, LabelledCompletion)
    assert isinstance(bad.value, LabelledCompletion)
    return PreferencePair(good.value.prompt, good.value.completion, bad.value.completion)


def _without_partner(row: Row) -> Problem:
    assert isinstance(row.value, LabelledCompletion)
    missing = "false" if row.value.label else "true"
    return Problem(
        row.file, row.line, f"no completion with label {missing} is left for the same prompt"
    )
