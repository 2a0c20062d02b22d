"""Parts of the dialogue where they do not belong: in a completion."""

from __future__ import annotations

from fusedpo.tools.formats.marks import TURN_ENDS, TURN_OPENS

from ..corpus import Corpus
from ..registry import Hits, rule
from ..text import normal

# Characters; a shorter question may well be repeated in an answer.
_AT_START, _INSIDE = 25, 40


@rule(
    "warning",
    "Strip the prompt from the completions: it is trained on twice, and counted as an answer. "
    "In rejected alone it may be a model that parrots; then keep it.",
)
def prompt_at_start(corpus: Corpus) -> Hits | None:
    """A completion starts with the prompt, or with its last turn."""
    rows, notes = [], {}
    for index, sides in enumerate(corpus.answers):
        starts = _prompts(corpus, index, _AT_START)
        names = [
            name
            for name, side in zip(corpus.sides, sides, strict=True)
            if starts and side.startswith(starts)
        ]
        if names:
            rows.append(index)
            notes[index] = f"{' and '.join(names)}: {corpus.entries[index].question}"
    return Hits(rows, notes) if rows else None


@rule(
    "note",
    "Right where the task is to rewrite or to quote. Elsewhere look whether the prompt was "
    "copied into the answer.",
)
def prompt_inside(corpus: Corpus) -> Hits | None:
    """A completion holds the whole last turn of the prompt, further on."""
    rows, notes = [], {}
    for index, sides in enumerate(corpus.answers):
        parts = _prompts(corpus, index, _INSIDE)
        names = [
            name
            for name, side in zip(corpus.sides, sides, strict=True)
            if parts and parts[-1] in side and not side.startswith(parts)
        ]
        if names:
            rows.append(index)
            notes[index] = f"{' and '.join(names)}: {corpus.entries[index].question}"
    return Hits(rows, notes) if rows else None


def _prompts(corpus: Corpus, index: int, least: int) -> tuple[str, ...]:
    """The whole prompt and its last turn, as they are compared, where they are long enough."""
    each = (corpus.prompts[index], normal(corpus.entries[index].question))
    return tuple(text for text in each if len(text) >= least)


@rule(
    "warning",
    "Cut the completions before the mark: the model would learn to play the other side, or to "
    "write its own template.",
)
def turn_marks(corpus: Corpus) -> Hits | None:
    """A completion goes on with another turn, or a message holds a mark of a chat template."""
    rows, notes = [], {}
    for index, entry in enumerate(corpus.entries):
        messages = not isinstance(entry.row.value.prompt, str)
        texts = (*entry.completions, *([entry.prompt] if messages else []))
        marks = {mark[0].strip() for text in texts for mark in TURN_OPENS.finditer(text)}
        if messages:
            # In strings they are what ends a completion.
            marks |= {mark[0] for text in texts for mark in TURN_ENDS.finditer(text)}
        if marks:
            rows.append(index)
            notes[index] = "holds " + ", ".join(repr(mark) for mark in sorted(marks))
    return Hits(rows, notes) if rows else None
