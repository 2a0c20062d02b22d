"""The values that every form of preference data becomes, and where they were read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}
Text = str | list[Message]


class FormatError(ValueError):
    """A record, or a file, that is not what its form must be. The message is the reason."""


@dataclass(frozen=True)
class PreferencePair:
    """A prompt and two completions of it. All three are texts, or all three are lists of messages.

    >>> PreferencePair("Name a colour.", " Blue.", " Seven.").chosen
    ' Blue.'
    """

    prompt: Text
    chosen: Text
    rejected: Text

    def __post_init__(self) -> None:
        _check_alike(prompt=self.prompt, chosen=self.chosen, rejected=self.rejected)


@dataclass(frozen=True)
class LabelledCompletion:
    """A prompt, one completion, and whether it is desirable. Texts, or lists of messages."""

    prompt: Text
    completion: Text
    label: bool

    def __post_init__(self) -> None:
        _check_alike(prompt=self.prompt, completion=self.completion)


def _check_alike(**parts: Text) -> None:
    kinds = {name: type(part).__name__ for name, part in parts.items()}
    if set(kinds.values()) not in ({"str"}, {"list"}):
        told = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise TypeError(f"all must be texts, or all lists of messages; got {told}.")


Value = PreferencePair | LabelledCompletion


@dataclass(frozen=True)
class Row:
    """A value, and where it begins: a line, or in a Parquet file a row, counted from 1."""

    value: Value
    file: str
    line: int
    record: dict[str, Any] = field(repr=False)  # as it was read, with every column


@dataclass(frozen=True)
class Problem:
    """A row that could not be used, and why. `line` is as in `Row`."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Loaded:
    """A file's rows, in its order, and what could not be read."""

    form: str
    rows: list[Row]
    problems: list[Problem]
    not_carried: dict[str, int]  # columns that no value holds -> how many rows have them
