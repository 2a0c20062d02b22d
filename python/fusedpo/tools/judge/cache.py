"""Replies on disk, so that nothing is asked twice, whatever happened in between.

One JSON object a line, `{"key": ..., "reply": ...}`, only ever appended to. A kill can leave the
beginning of a line at the end, which is cut off when the file is opened again; anything else that
is not such a line is an error that changes nothing, for nobody knows what was there. What is kept
is the reply and not the verdict, so that reading it better costs no second question.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

from fusedpo.tools.files import append_rows, lines_and_rest, open_alone


class ReplyCache:
    """A file of replies, or with `path` None the same in memory alone; one process at a time.

    Example:

        with ReplyCache("verdicts.jsonl") as cache:
            cache.put(content_key({"model": "m", "prompt": "p"}), "A")

    Raises:
        OSError: the file cannot be read or written, or another process writes to it.
        ValueError: a line is not of this form; the message has file and line.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._replies: dict[str, str] = {}
        self._file: IO[bytes] | None = None
        if path is not None:
            self._file = open_alone(pathlib.Path(path))
            try:
                self._read(os.fspath(path), self._file)
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> ReplyCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> str | None:
        return self._replies.get(key)

    def put(self, key: str, reply: str) -> None:
        """Keep a reply; when this returns, a kill of the process does not lose it."""
        self._replies[key] = reply
        if self._file is not None:
            append_rows(self._file, [{"key": key, "reply": reply}])

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _read(self, path: str, file: IO[bytes]) -> None:
        lines, rest = lines_and_rest(file)
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                self._replies[entry["key"]] = str(entry["reply"])
            except (ValueError, KeyError, TypeError) as error:
                raise _no_line(path, number, line) from error
        if rest:
            if not _begins_a_line(rest):
                raise _no_line(path, len(lines) + 1, rest)
            file.truncate(sum(map(len, lines)))


def _no_line(path: str, number: int, line: bytes) -> ValueError:
    return ValueError(
        f'{path}:{number} must be a line of a cache of replies, {{"key": ..., "reply": ...}}; got '
        f"{line[:80]!r}. Remove that line, or name another file."
    )


def _begins_a_line(rest: bytes) -> bool:
    """Whether a kill while `put` wrote can have left this; anything else is not ours to cut off."""
    opening, between = b'{"key": "', b'", "reply": "'
    if not rest.startswith(opening):
        return opening.startswith(rest)
    _, quote, after = rest[len(opening) :].partition(b'"')
    return between.startswith((quote + after)[: len(between)])


def content_key(content: Mapping[str, Any]) -> str:
    """Return a digest of JSON-able content: 32 hex digits, equal for equal content alone."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
