"""Judging functions for the tests; named on the command line as judges:<name>."""

from __future__ import annotations


def first(prompt: str, first: str, second: str) -> str:
    return "[[A]]"


def longer(prompt: str, first: str, second: str) -> str:
    if len(first) == len(second):
        return "tie"
    return "A" if len(first) > len(second) else "B"


def number(prompt: str, first: str, second: str) -> str:
    return len(first)  # type: ignore[return-value]


NOT_A_FUNCTION = "A"
