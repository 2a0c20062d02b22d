"""How like each other the two sides of a pair are."""

from __future__ import annotations

from fusedpo.tools.formats.display import excerpt

from ..corpus import Corpus
from ..registry import Hits, rule
from ..text import words

NEAR = 0.9  # similarity of characters, from rapidfuzz
FAR = 0.05  # share of the shorter side's words that the other has, too
FAR_WORDS = 20


@rule("error", "Remove these rows: there is nothing to prefer.", removable=True, needs=("pairs",))
def identical_sides(corpus: Corpus) -> Hits | None:
    """Chosen and rejected are the same text."""
    rows = [
        index
        for index, (_, (chosen, rejected)) in enumerate(corpus.keys)
        if chosen == rejected and corpus.answers[index][0]
    ]
    return Hits(rows) if rows else None


@rule(
    "warning",
    "Look whether it is meant, as in code: the indentation may be the lesson. Elsewhere remove "
    "these rows.",
    needs=("pairs",),
)
def white_space_alone(corpus: Corpus) -> Hits | None:
    """Chosen and rejected differ in white space alone."""
    rows = [
        index
        for index, (_, (chosen, rejected)) in enumerate(corpus.loose_keys)
        if chosen == rejected and len(set(corpus.keys[index].sides)) == 2
    ]
    return Hits(rows) if rows else None


@rule(
    "warning",
    "Look what the difference is. Pairs that differ in a few characters push both sides down "
    "together (likelihood displacement); keep them if that difference is the lesson.",
    needs=("pairs",),
)
def near_identical_sides(corpus: Corpus) -> Hits | None:
    """Chosen and rejected are nearly the same text."""
    from rapidfuzz import fuzz

    found = {}
    for index, (chosen, rejected) in enumerate(corpus.answers):
        similarity = fuzz.ratio(chosen, rejected, score_cutoff=100 * NEAR) / 100
        if similarity > NEAR and chosen != rejected:
            found[index] = similarity
    if not found:
        return None
    rows = sorted(found, key=lambda index: -found[index])
    notes = {index: f"{found[index]:.3f}: {corpus.entries[index].completions[0]}" for index in rows}
    what = f"Chosen and rejected differ in less than {1 - NEAR:.0%} of their characters."
    return Hits(rows, notes, what, figures={"most": found[rows[0]]})


@rule(
    "warning",
    "Look whether both sides answer the same prompt. Of such a pair the model learns a topic or "
    "a language, not quality.",
    needs=("pairs",),
)
def unlike_sides(corpus: Corpus) -> Hits | None:
    """Chosen and rejected have next to no word in common."""
    found = {}
    fewest = corpus.word_counts.min(axis=1)
    for index, sides in enumerate(corpus.answers):
        if fewest[index] < FAR_WORDS:
            continue
        chosen, rejected = (set(words(side.lower())) for side in sides)
        shared = len(chosen & rejected) / min(len(chosen), len(rejected))
        if shared < FAR:
            found[index] = shared
    if not found:
        return None
    rows = sorted(found, key=lambda index: found[index])
    notes = {index: _both(corpus.entries[index].completions) for index in rows}
    what = f"Chosen and rejected share less than {FAR:.0%} of their words."
    return Hits(rows, notes, what)


def _both(sides: tuple[str, ...]) -> str:
    """The beginnings of two texts in one excerpt."""
    return " | ".join(excerpt(side, 34) for side in sides)
