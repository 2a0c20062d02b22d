"""Preferences that go round in a circle, as majorities of annotators may: A > B, B > C, C > A."""

from __future__ import annotations

from collections import defaultdict

from ..corpus import Corpus
from ..registry import Hits, rule
from ..text import Key

Edge = tuple[Key, Key]  # chosen, rejected


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
            chosen, rejected = corpus.loose_keys[index].sides
            rows[chosen, rejected].append(index)
        # Two rows that contradict each other are no circle; another rule has them.
        edges = {(a, b) for a, b in rows if (b, a) not in rows}
        found = sorted(index for edge in _in_circles(edges) for index in rows[edge])
        lines = [corpus.entries[index].line for index in found]
        told = "lines " + ", ".join(map(str, lines))
        notes.update(dict.fromkeys(found, told))
    return Hits(list(notes), notes) if notes else None


def _in_circles(edges: set[Edge]) -> set[Edge]:
    """The edges that are part of a circle: those within a strongly connected component."""
    if len(edges) < 3:  # as of nearly every prompt
        return set()
    import networkx

    found = networkx.strongly_connected_components(networkx.DiGraph(edges))
    component = {answer: number for number, answers in enumerate(found) for answer in answers}
    return {(a, b) for a, b in edges if component[a] == component[b]}
