"""Which languages the completions are in."""

from __future__ import annotations

from collections import Counter

from ..corpus import Corpus
from ..registry import Hits, rule


@rule(
    "note",
    "Right for a multilingual model. Where one language is wanted, filter the others; what is "
    "rare is learnt badly.",
)
def mixed_languages(corpus: Corpus) -> Hits | None:
    """Completions are in several languages."""
    counts = Counter(code for sides in corpus.languages for code in set(sides) if code)
    if len(counts) < 2:
        return None
    main = counts.most_common(1)[0][0]
    rows, notes = [], {}
    for index, sides in enumerate(corpus.languages):
        others = sorted({code for code in sides if code and code != main})
        if others:
            rows.append(index)
            text = corpus.entries[index].completions[sides.index(others[0])]
            notes[index] = f"{', '.join(others)}: {text}"
    shares = ", ".join(f"{code} {count}" for code, count in counts.most_common(6))
    more = f" and {len(counts) - 6} more" if len(counts) > 6 else ""
    what = f"Completions are in several languages; rows: {shares}{more}."
    return Hits(rows, notes, what, figures=dict(counts))


@rule(
    "warning",
    "Look which language the prompt asks for. If it is always the same side that answers in "
    "the wrong one, the model learns the language and little else.",
    needs=("pairs",),
)
def language_differs(corpus: Corpus) -> Hits | None:
    """Chosen and rejected are in different languages."""
    rows = [
        index
        for index, (chosen, rejected) in enumerate(corpus.languages)
        if chosen and rejected and chosen != rejected
    ]
    if not rows:
        return None
    notes = {
        index: f"{' and '.join(corpus.languages[index])}: {corpus.entries[index].completions[0]}"
        for index in rows
    }
    return Hits(rows, notes)
