"""A row's columns, which remember what a parser read: what it did not read is lost, and told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .messages import KEYS

_MESSAGE_KEYS = {key for keys in KEYS for key in keys}


class Columns(Mapping[str, Any]):
    """The columns of one row that hold something; null is as good as no column.

    >>> columns = Columns({"prompt": "2+2?", "score": 3, "id": None})
    >>> columns["prompt"], columns.unread()
    ('2+2?', {'score'})
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._held = {name: value for name, value in record.items() if value is not None}
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._held[name]
        self._read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._held  # to ask whether it is there is not to read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def unread(self) -> set[str]:
        """Names of what was not read: columns, and keys of messages."""
        names = set(self._held) - self._read
        for column in self._read:
            names.update(f"{column}[].{key}" for key in _other_keys(self._held[column]))
        return names


def _other_keys(value: Any) -> set[str]:
    messages = value if isinstance(value, list) else [value]
    return {
        key
        for message in messages
        if isinstance(message, dict)
        for key, held in message.items()
        if key not in _MESSAGE_KEYS and held is not None
    }
