"""Texts of the data as a person may see them: no character that moves a terminal's cursor."""

from __future__ import annotations

from collections.abc import Iterable

_JOINERS = "\u200c\u200d"  # Persian, Hindi and emoji need them


def printable(text: str) -> str:
    """Return the text with the names of characters that a terminal would obey or not show.

    >>> printable("a\\x1b[2J")
    'a[U+001B][2J'
    """
    return "".join(
        each if each.isprintable() or each in _JOINERS else f"[U+{ord(each):04X}]" for each in text
    )


def excerpt(text: str, length: int = 72) -> str:
    """Return the beginning of a text in one line, about `length` characters, printable.

    >>> excerpt("a\\x1b[2Jb  and\\u200b more words", 14)
    'a[U+001B][2Jb and[U+200B] m…'
    """
    line = " ".join(text[: 4 * length].split())
    return printable(line if len(line) <= length else line[: length - 1] + "…")


def listed(names: Iterable[str]) -> str:
    """Return names of columns as a message has them."""
    return ", ".join(map(excerpt, names))


def rows(count: int) -> str:
    """Return "1 row", "2 rows"."""
    return f"{count} row" if count == 1 else f"{count} rows"
