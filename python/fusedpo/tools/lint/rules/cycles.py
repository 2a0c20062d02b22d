"""Preferences that go round in a circle, as majorities of annotators may: A > B, B > C, C > A."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from ..corpus import Corpus
from ..registry import Hits, rule

Edge = tuple[str, str]  # chosen, rejected


@rule(
    "warning",
    "Leave out the row that is least certain. No ranking agrees with all of these.",
    needs=("pairs",),
)
def circular_preferences(corpus: Corpus) -> Hits | None:
    """Several pairs of one prompt go round in a circle."""
    notes = {}
    for group in corpus.by_prompt:
        rows: dict[Edge, list[int]] = defaultdict(list)
        for index in group:
            chosen, rejected = corpus.answers[index]
            rows[chosen, rejected].append(index)
        # Two rows that contradict each other are no circle; another rule has them.
        edges = {(a, b) for a, b in rows if (b, a) not in rows}
        found = sorted(index for edge in _in_circles(edges) for index in rows[edge])
        lines = [corpus.entries[index].line for index in found]
        told = "lines " + ", ".join(map(str, lines))
        notes.update(dict.fromkeys(found, told))
    return Hits(list(notes), notes) if notes else None


def _in_circles(edges: set[Edge]) -> set[Edge]:
    """The edges that are part of a circle."""
    before = None
    while edges and edges != before:  # what nothing leads to, or from, is in none
        before = edges
        starts, ends = {a for a, _ in edges}, {b for _, b in edges}
        edges = {(a, b) for a, b in edges if a in ends and b in starts}
    following: dict[str, list[str]] = defaultdict(list)
    for a, b in edges:
        following[a].append(b)
    reachable = {b: _reachable(b, following) for b in following}
    return {(a, b) for a, b in edges if a in reachable[b]}


def _reachable(start: str, following: Mapping[str, Iterable[str]]) -> set[str]:
    seen, waiting = {start}, [start]
    while waiting:
        new = set(following.get(waiting.pop(), ())) - seen
        seen |= new
        waiting += new
    return seen
