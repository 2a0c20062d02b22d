"""The rows of a data set as the rules read them; what several rules need is worked out once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fusedpo.tools.formats import PreferencePair, Problem, Row
from fusedpo.tools.formats.conversations import completions_of

from .encoding import Encoded, Limit
from .languages import detect
from .text import Key, exact, key, normal, plain, question, words


@dataclass(frozen=True)
class Entry:
    """One row as text.

    Attributes:
        file, line: where it is.
        prompt, question: the whole prompt, and its last turn.
        completions: (chosen, rejected), or the one completion of a labelled row.
        label: of a labelled row, else None.
        row: what was read.
    """

    file: str
    line: int
    prompt: str
    question: str
    completions: tuple[str, ...]
    label: bool | None
    row: Row


class RowKey(NamedTuple):
    """What is the same for rows that are alike: by prompt, and by completions."""

    prompt: Key
    sides: tuple[Key, ...]


class Corpus:
    """A data set under check.

    Args:
        rows, problems, other_columns: from `fusedpo.tools.formats.read_rows`; rows are all pairs,
            or all labelled.
        encoded: token counts, one for each row; None without a tokenizer.
        limit: max_length and truncation_mode of the training.

    Raises:
        ValueError: pairs and labelled rows in one data set.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        problems: Sequence[Problem] = (),
        other_columns: Mapping[str, int] | None = None,
        encoded: Sequence[Encoded] | None = None,
        limit: Limit | None = None,
    ) -> None:
        self.entries = [_entry(row) for row in rows]
        self.problems = problems
        self.other_columns = other_columns or {}
        self.limit = limit or Limit(None)
        self._encoded = encoded
        odd = next((each for each in self.entries if (each.label is None) != self.are_pairs), None)
        if odd is not None:
            kinds = ("pairs", "labelled rows") if self.are_pairs else ("labelled rows", "pairs")
            raise ValueError(
                f"the rows must be all pairs or all labelled; they begin with {kinds[0]}, and "
                f"{kinds[1]} follow in {odd.file}:{odd.line}. Keep them in two files."
            )

    @property
    def are_pairs(self) -> bool:
        return bool(self.entries) and self.entries[0].label is None

    @property
    def sides(self) -> tuple[str, ...]:
        """What the completions are called."""
        return ("chosen", "rejected") if self.are_pairs else ("completion",)

    @property
    def encoded(self) -> Sequence[Encoded]:
        """Token counts of each row; for rules that need a tokenizer."""
        assert self._encoded is not None, "a rule that reads tokens must need a tokenizer"
        return self._encoded

    @property
    def properties(self) -> frozenset[str]:
        """What is there, in the words of `Rule.needs`."""
        found = set()
        if self.entries:
            found.add("pairs" if self.are_pairs else "labels")
        if any(not isinstance(entry.row.value.prompt, str) for entry in self.entries):
            found.add("messages")
        if self._encoded is not None:
            found.add("tokenizer")
        if self.limit.max_length is not None:
            found.add("max_length")
        return frozenset(found)

    @cached_property
    def prompts(self) -> list[str]:
        """Every prompt with white space counted once; roles do not show."""
        return [normal(entry.prompt) for entry in self.entries]

    @cached_property
    def answers(self) -> list[tuple[str, ...]]:
        """Every row's completions with white space counted once."""
        return [tuple(normal(text) for text in entry.completions) for entry in self.entries]

    @cached_property
    def keys(self) -> list[RowKey]:
        """What each row is, with its roles and line structure: for rules that remove rows."""
        return self._keys(exact)

    @cached_property
    def loose_keys(self) -> list[RowKey]:
        """The same where white space counts once."""
        return self._keys(normal)

    @cached_property
    def word_counts(self) -> np.ndarray:
        """Words [rows, sides] of the completions."""
        counts = [[len(words(text)) for text in entry.completions] for entry in self.entries]
        return self._by_side(counts)

    @cached_property
    def prompt_words(self) -> np.ndarray:
        """Words [rows] of the prompts."""
        return np.array([len(words(entry.prompt)) for entry in self.entries], dtype=np.int64)

    @cached_property
    def prompt_tokens(self) -> np.ndarray:
        """Tokens [rows] of the prompts."""
        return np.array([each.prompt for each in self.encoded], dtype=np.int64)

    @cached_property
    def token_counts(self) -> np.ndarray:
        """Tokens [rows, sides] of the completions."""
        return self._by_side([each.completions for each in self.encoded])

    @cached_property
    def languages(self) -> list[tuple[str, ...]]:
        """The language of every row's completions, "" where it is not clear."""
        return [tuple(detect(text) for text in entry.completions) for entry in self.entries]

    @cached_property
    def by_prompt(self) -> list[list[int]]:
        """The rows of every prompt, in order."""
        groups: dict[Key, list[int]] = defaultdict(list)
        for index, each in enumerate(self.loose_keys):
            groups[each.prompt].append(index)
        return list(groups.values())

    def _keys(self, compared: Callable[[str], str]) -> list[RowKey]:
        values = [entry.row.value for entry in self.entries]
        return [
            RowKey(
                key(value.prompt, compared),
                tuple(key(side, compared) for side in completions_of(value)),
            )
            for value in values
        ]

    def _by_side(self, counts: Sequence[Sequence[int]]) -> np.ndarray:
        # The shape holds without rows, too.
        return np.array(counts, dtype=np.int64).reshape(len(self.entries), len(self.sides))


def _entry(row: Row) -> Entry:
    value = row.value
    return Entry(
        file=row.file,
        line=row.line,
        prompt=plain(value.prompt),
        question=question(value.prompt),
        completions=tuple(map(plain, completions_of(value))),
        label=None if isinstance(value, PreferencePair) else value.label,
        row=row,
    )
