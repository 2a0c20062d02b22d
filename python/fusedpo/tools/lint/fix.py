"""A copy of a data set without the rows that should not be trained on. No text is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fusedpo.tools.formats import write_records

from .corpus import Corpus
from .findings import Fixed, Removed

_UNREADABLE = ("unreadable_rows",)


def write_without(corpus: Corpus, rules: Mapping[int, Sequence[str]], path: str) -> Fixed:
    """Write the rows that no rule removes, with all their columns.

    Args:
        corpus: the data set.
        rules: for each row to be removed the names of the rules that want it.
        path: a .jsonl, .json or .parquet file; it appears whole or not at all.

    Raises:
        ValueError, OSError: no row is left; see `fusedpo.tools.formats.write_records`.
    """
    kept = [entry for index, entry in enumerate(corpus.entries) if index not in rules]
    if not kept:
        raise ValueError("every row has a finding that removes it, and a file must have one row")
    places = [f"{entry.file}:{entry.line}" for entry in kept]
    write_records([entry.row.record for entry in kept], path, places)
    removed = [
        Removed(entry.file, entry.line, tuple(rules[index]))
        for index, entry in enumerate(corpus.entries)
        if index in rules
    ]
    removed += [Removed(each.file, each.line, _UNREADABLE) for each in corpus.problems]
    removed.sort(key=lambda each: (each.file, each.line))
    return Fixed(path, len(kept), tuple(removed))
