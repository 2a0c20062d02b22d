"""Rows as TRL reads them: by their columns, which may be other than the value that is meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusedpo.tools.formats import Message, PreferencePair, Row, Text
from fusedpo.tools.formats.conversations import completions_of
from fusedpo.tools.formats.templates import HH


@dataclass(frozen=True)
class Parts:
    """What is tokenised of one row. All texts, or all lists of messages."""

    prompt: Text
    completions: tuple[Text, ...]


def read_by_trl(row: Row) -> Parts:
    """Return the parts of a row that TRL's trainers tokenise.

    Where TRL does not read the row (`why_not`), the parts that it has after a conversion.
    """
    value = row.value
    if why_not(row):
        return Parts(value.prompt, tuple(completions_of(value)))
    held = _held(row)
    if "prompt" in held:
        return Parts(held["prompt"], tuple(held[name] for name in _names(row)))
    chosen, rejected = held["chosen"], held["rejected"]
    at = _shared(chosen, rejected)
    return Parts(chosen[:at], (chosen[at:], rejected[at:]))


def why_not(row: Row) -> str:
    """Return why TRL does not read a row, or reads another one in it; "" where it does."""
    held = _held(row)
    labelled = not isinstance(row.value, PreferencePair)
    needed = ("prompt", "completion", "label") if labelled else ("chosen", "rejected")
    missing = [name for name in needed if name not in held]
    if missing:
        return f"there is no column {missing[0]}"
    of_csv = row.file.lower().endswith(".csv")  # from which TRL's reader makes labels of texts
    if labelled and isinstance(held["label"], str) and not of_csv:
        return f"its label is the text {held['label']!r}"
    names = [name for name in ("prompt", *_names(row)) if name in held]
    parts = [held[name] for name in names]
    if all(isinstance(part, str) for part in parts):
        return _why_not_texts(row, parts)
    if not all(isinstance(part, list) and all(map(_is_message, part)) for part in parts):
        return f"{', '.join(names)} must be all texts, or all lists of role and content"
    if of_csv:
        return "it takes messages in a CSV for texts"
    prompt, completions = (parts[0], parts[1:]) if "prompt" in held else ([], parts)
    meant = [[*row.value.prompt, *each] for each in completions_of(row.value)]
    if [_turns([*prompt, *each]) for each in completions] != meant:
        return "it reads other messages: no column system, no other names of roles, a prompt twice"
    return ""


def _why_not_texts(row: Row, parts: Sequence[str]) -> str:
    value = row.value
    if len(parts) > len(_names(row)):
        meant = [value.prompt, *completions_of(value)]
        return "" if list(parts) == meant else "it reads no other columns than prompt and answers"
    # TRL takes what both texts share for the prompt, which is right for transcripts.
    if not all(map(HH.begins, parts)):
        return "there is no column prompt"
    return "it does not read the column system" if row.record.get("system") else ""


def _names(row: Row) -> tuple[str, ...]:
    return ("chosen", "rejected") if isinstance(row.value, PreferencePair) else ("completion",)


def _held(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.record.items() if value is not None}


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def _turns(messages: Sequence[dict[str, Any]]) -> list[Message]:
    return [{"role": each["role"], "content": each["content"]} for each in messages]


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Where two completions part, as TRL's `extract_prompt` has it: characters, or messages."""
    length = min(len(one), len(other))
    at = next((index for index in range(length) if one[index] != other[index]), None)
    if at is None:
        return length - 1
    return at - 1 if at and one[at - 1] == " " else at
