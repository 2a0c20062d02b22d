"""Lines that are no rows, and rows with nothing in them."""

from __future__ import annotations

from fusedpo.tools.formats.display import excerpt
from fusedpo.tools.formats.display import rows as rows_of

from ..corpus import Corpus
from ..findings import Example
from ..registry import Hits, rule


@rule(
    "error",
    "Mend these lines, or leave them out. A training would stop there, or read something else.",
    removable=True,
)
def unreadable_rows(corpus: Corpus) -> Hits | None:
    """The row cannot be read in the form of the others."""
    if not corpus.problems:
        return None
    places = [Example(each.file, each.line, excerpt(each.reason)) for each in corpus.problems]
    return Hits(places=places, count=len(places))


@rule("error", "Remove these rows: an answer is missing.", removable=True)
def empty_completions(corpus: Corpus) -> Hits | None:
    """A completion is empty."""
    rows = [index for index, sides in enumerate(corpus.answers) if not all(sides)]
    if not rows:
        return None
    notes = {
        index: "empty: "
        + ", ".join(
            name for name, side in zip(corpus.sides, corpus.answers[index], strict=True) if not side
        )
        for index in rows
    }
    return Hits(rows, notes)


@rule(
    "warning",
    "Look where the prompt went in the conversion. The model would learn to answer to nothing.",
)
def empty_prompts(corpus: Corpus) -> Hits | None:
    """The prompt is empty."""
    rows = [index for index, prompt in enumerate(corpus.prompts) if not prompt]
    return Hits(rows) if rows else None


@rule(
    "note",
    "Right where answers are labels (yes or no). Elsewhere look whether they were cut off.",
)
def short_completions(corpus: Corpus) -> Hits | None:
    """A completion has one or two words."""
    least = corpus.word_counts.min(axis=1, initial=3)
    rows = [
        index
        for index, sides in enumerate(corpus.answers)
        if least[index] < 3 and all(sides)  # empty ones have a rule of their own
    ]
    if not rows:
        return None
    rows.sort(key=lambda index: int(least[index]))
    shortest = corpus.word_counts.argmin(axis=1)
    notes = {index: corpus.entries[index].completions[shortest[index]] for index in rows}
    return Hits(rows, notes)


@rule("note", "Look whether the training needs them (TRL reads `tools`, for one).")
def other_columns(corpus: Corpus) -> Hits | None:
    """There are columns that are not checked here, and that a conversion would not carry."""
    if not corpus.other_columns:
        return None
    names = ", ".join(
        f"{excerpt(name)} ({rows_of(count)})" for name, count in corpus.other_columns.items()
    )
    return Hits(what=f"Not checked: {names}.", count=max(corpus.other_columns.values()))
