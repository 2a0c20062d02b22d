"""What occurs more than once, and what contradicts itself."""

from __future__ import annotations

from collections import defaultdict

from ..corpus import Corpus, RowKey
from ..registry import Hits, rule
from ..text import Key


@rule(
    "note",
    "Right where a prompt has several ranked answers. Keep all pairs of a prompt in one split, "
    "or the evaluation knows them; and see that no prompt outweighs the others.",
)
def duplicate_prompts(corpus: Corpus) -> Hits | None:
    """Several rows have the same prompt."""
    groups = [group for group in corpus.by_prompt if len(group) > 1]
    if not groups:
        return None
    groups.sort(key=len, reverse=True)
    rows = [index for group in groups for index in group]
    notes = {
        group[0]: f"{len(group)} times: {corpus.entries[group[0]].question}" for group in groups
    }
    most = len(groups[0])
    what = f"Several rows have the same prompt (prompts: {len(groups)}, most rows of one: {most})."
    # One example of each prompt, then the others.
    first = [group[0] for group in groups]
    rows = first + [index for index in rows if index not in notes]
    return Hits(rows, notes, what, figures={"prompts": len(groups), "most": most})


@rule("warning", "Keep one of each: the others only raise its weight.", removable=True)
def duplicate_rows(corpus: Corpus) -> Hits | None:
    """The row was there before, with the same prompt, completions and label."""
    seen: dict[object, int] = {}
    notes = {}
    for index, key in enumerate(corpus.keys):
        first = seen.setdefault((key, corpus.entries[index].label), index)
        if first != index:
            notes[index] = f"as line {corpus.entries[first].line}"
    return Hits(list(notes), notes) if notes else None


@rule(
    "warning",
    "Look whether the difference is meant, as in code; else keep one of them, the right one.",
)
def repeats_but_for_white_space(corpus: Corpus) -> Hits | None:
    """The row was there before, or its reverse, but for white space within its texts."""
    seen: dict[object, int] = {}
    notes = {}
    for index, loose in enumerate(corpus.loose_keys):
        first = seen.setdefault((loose.prompt, frozenset(loose.sides)), index)
        if _unordered(corpus.keys[first]) != _unordered(corpus.keys[index]):
            notes[index] = f"as line {corpus.entries[first].line}"
    return Hits(list(notes), notes) if notes else None


def _unordered(key: RowKey) -> tuple[Key, frozenset[Key]]:
    return key.prompt, frozenset(key.sides)


@rule(
    "error",
    "Decide which of them is right and remove the other; `--fix` removes both.",
    removable=True,
    needs=("pairs",),
)
def contradicting_pairs(corpus: Corpus) -> Hits | None:
    """One row prefers A to B, another one B to A, for the same prompt."""
    places: dict[tuple[Key, Key, Key], list[int]] = defaultdict(list)
    for index, (prompt, (chosen, rejected)) in enumerate(corpus.keys):
        places[prompt, chosen, rejected].append(index)
    notes = {}
    for (prompt, chosen, rejected), rows in places.items():
        reverse = places.get((prompt, rejected, chosen))
        if reverse and chosen != rejected:
            line = corpus.entries[reverse[0]].line
            notes.update(dict.fromkeys(rows, f"the reverse of line {line}"))
    return _contradictions(notes)


@rule(
    "error",
    "Decide which of them is right and remove the other; `--fix` removes both.",
    removable=True,
    needs=("labels",),
)
def contradicting_labels(corpus: Corpus) -> Hits | None:
    """The same completion of the same prompt is called both good and bad."""
    places: dict[RowKey, dict[bool, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, key in enumerate(corpus.keys):
        places[key][bool(corpus.entries[index].label)].append(index)
    notes = {}
    for labels in places.values():
        if len(labels) == 2:
            for label, rows in labels.items():
                line = corpus.entries[labels[not label][0]].line
                notes.update(dict.fromkeys(rows, f"{label} here, {not label} in line {line}"))
    return _contradictions(notes)


def _contradictions(notes: dict[int, str]) -> Hits | None:
    return Hits(sorted(notes), notes) if notes else None
