"""Conversations and pairs for the tests of conversion: any texts, without marks of a template."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from fusedpo.tools.formats import PreferencePair, read_rows
from fusedpo.tools.formats.templates import TEMPLATES
from hypothesis import strategies as st

_MARKS = [
    mark.strip("\n")
    for template in TEMPLATES.values()
    for mark in (*template.openings.values(), template.closing)
    if mark
]
# Besides any text: what the templates are made of, at the ends of contents.
_pieces = st.text(max_size=8) | st.sampled_from(
    ["\n", "\n\n", " ", "\r\n", "\u2028", "Human", "Assistant:", "<|", "|>", "user\n", "\ufeff"]
)
texts = (
    st.lists(_pieces, max_size=4)
    .map("".join)
    .filter(lambda text: not any(mark in text for mark in _MARKS))
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


@st.composite
def _conversation(draw: st.DrawFn) -> list[dict[str, str]]:
    turns = [system(draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [user(draw(texts)), assistant(draw(texts))]
    return [*turns, user(draw(texts))]


conversations = _conversation()


@st.composite
def _completion(draw: st.DrawFn, turns: int) -> list[dict[str, str]]:
    roles = [assistant, user] * turns
    return [role(draw(texts)) for role in roles[:turns]]


@st.composite
def pairs(draw: st.DrawFn, turns: Any = st.just(1)) -> PreferencePair:  # noqa: B008
    """Pairs whose completions have `turns` messages."""
    number = draw(turns)
    return PreferencePair(draw(conversations), draw(_completion(number)), draw(_completion(number)))


PAIR = PreferencePair([user("2+2?")], [assistant("4")], [assistant("5")])
TEXTS = {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}


def write(path: pathlib.Path, rows: list[Any]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values(path: pathlib.Path) -> list[Any]:
    loaded = read_rows(path)
    assert loaded.problems == []
    return [row.value for row in loaded.rows]
