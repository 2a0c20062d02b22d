"""What a rule is: a function over a corpus, with a severity and a word on what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fusedpo.tools.formats.display import excerpt

from .findings import Example, Severity

if TYPE_CHECKING:
    from .corpus import Corpus

EXAMPLES_SHOWN = 3


@dataclass(frozen=True)
class Hits:
    """What a rule's function found.

    Attributes:
        rows: indexes into the corpus, the clearest example first.
        notes: what to look at in a row; where there is none, the row's first completion.
        what: a sentence with figures, where the rule's own says too little.
        places: for findings about lines that are no rows: instead of `rows`.
        figures: the numbers, for programs.
        count: how many rows are concerned, where `rows` cannot tell.
    """

    rows: Sequence[int] = ()
    notes: Mapping[int, str] = field(default_factory=dict)
    what: str = ""
    places: Sequence[Example] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    count: int | None = None


# What a caller may add, and how a report asks for it. The other needs ("pairs", "labels",
# "messages") are of the data itself: a rule for other data has nothing to say.
OPTIONAL = {
    "tokenizer": "a tokenizer (--tokenizer)",
    "max_length": "a limit (--max-length)",
}

Find = Callable[["Corpus"], "Hits | None"]


@dataclass(frozen=True)
class Rule:
    """One thing to look for.

    Attributes:
        name: the function's name.
        about: what the rule looks for, in one sentence.
        severity, advice: of its findings.
        removable: `fix` removes the rows that it finds.
        needs: what must be there for the rule to run: "pairs", "labels", "messages", or a key of
            `OPTIONAL`.
        find: returns what it found, or None.
    """

    name: str
    about: str
    severity: Severity
    advice: str
    removable: bool
    needs: tuple[str, ...]
    find: Find


def rule(
    severity: Severity, advice: str, *, removable: bool = False, needs: tuple[str, ...] = ()
) -> Callable[[Find], Rule]:
    """Make a rule of a function; its docstring's first line is `about`."""

    def make(find: Find) -> Rule:
        about = (find.__doc__ or "").strip().partition("\n")[0]
        return Rule(find.__name__, about, severity, advice, removable, needs, find)

    return make


def examples(corpus: Corpus, hits: Hits) -> tuple[Example, ...]:
    """Return the first rows of a finding as a report shows them."""
    shown = list(hits.places[:EXAMPLES_SHOWN])
    for index in list(hits.rows)[: EXAMPLES_SHOWN - len(shown)]:
        entry = corpus.entries[index]
        text = hits.notes.get(index) or entry.completions[0] or entry.prompt
        shown.append(Example(entry.file, entry.line, excerpt(text)))
    return tuple(shown)
