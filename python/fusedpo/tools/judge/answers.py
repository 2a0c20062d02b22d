"""Answers to prompts, as `fusedpo generate` writes them; two sets of them matched."""

from __future__ import annotations

import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from .endpoint import Message

Text = str | list[Message]


class Answered(Protocol):
    """What can be judged: a `Generation`, an `Answer`, or anything else with these two."""

    @property
    def prompt(self) -> Any: ...
    @property
    def completion(self) -> Any: ...


class Answer(NamedTuple):
    """A prompt and a completion, each a text or messages."""

    prompt: Any
    completion: Any


class Match(NamedTuple):
    """A prompt with an answer of each set, as plain text; `sample` counts those of one prompt."""

    prompt: str
    a: str
    b: str
    sample: int


def read_answers(path: str | os.PathLike[str]) -> list[Answer]:
    """Read a JSONL file with `prompt` and `completion` in each line (texts or lists of messages).

    Raises:
        OSError: it cannot be read.
        ValueError: a line has another form; the message has file and line.
    """
    answers = []
    with pathlib.Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                answer = Answer(row["prompt"], row["completion"])
                plain_text(answer.prompt), plain_text(answer.completion)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{os.fspath(path)}:{number} must be a JSON object with `prompt` and "
                    f"`completion`, texts or lists of messages; got {line.strip()[:80]!r}."
                ) from error
            answers.append(answer)
    if not answers:
        raise ValueError(f"{os.fspath(path)} has no answer to judge; it must have at least one.")
    return answers


def plain_text(value: Any) -> str:
    """Return a text as it is; messages as `role: content` paragraphs, one alone as its content.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_message(each) for each in value):
        if len(value) == 1:
            return str(value[0]["content"])
        return "\n\n".join(f"{each['role']}: {each['content']}" for each in value)
    raise TypeError(f"must be a text or a list of messages; got {value!r}")


def matched(a: Iterable[Answered], b: Iterable[Answered]) -> list[Match]:
    """Pair the i-th answer to a prompt in `a` with the i-th answer to it in `b`, in `a`'s order.

    Raises:
        ValueError: there is no answer, or the two do not answer the same prompts equally often.
    """
    ours, theirs = _numbered(a), _numbered(b)
    for name, extra in (("first", ours.keys() - theirs), ("second", theirs.keys() - ours)):
        if extra:
            example = min(extra)
            raise ValueError(
                "both sets must answer the same prompts, equally often; the "
                f"{name} has {len(extra)} answers without a partner, such as answer "
                f"{example[1] + 1} to {example[0][:80]!r}. Generate both from the same prompts."
            )
    if not ours:
        raise ValueError("there must be at least one answer to judge; got none.")
    return [Match(prompt, ours[prompt, i], theirs[prompt, i], i) for prompt, i in ours]


def _numbered(answers: Iterable[Answered]) -> dict[tuple[str, int], str]:
    seen: Counter[str] = Counter()
    numbered = {}
    for answer in answers:
        prompt = plain_text(answer.prompt)
        numbered[prompt, seen[prompt]] = plain_text(answer.completion)
        seen[prompt] += 1
    return numbered


def as_messages(prompt: Text) -> list[Message]:
    """A prompt as the conversation that a server is given."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def sequence_of(answers: str | os.PathLike[str] | Sequence[Answered]) -> Sequence[Answered]:
    """A file's answers, or those that are given."""
    return read_answers(answers) if isinstance(answers, (str, os.PathLike)) else answers
