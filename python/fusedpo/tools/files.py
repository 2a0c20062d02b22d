"""Files that a killed run goes on with: held by one process, appended whole, settings that stay."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any


def open_alone(path: pathlib.Path) -> IO[bytes]:
    """Open a file for reading and appending, with its folder made; it is ours until it is closed,
    or this process ends in any way.

    Raises:
        BlockingIOError: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BlockingIOError(
            f"{path} is in use by another process; wait for it, or name another file."
        ) from None
    return file


def append_rows(file: IO[bytes], rows: Sequence[Mapping[str, Any]]) -> None:
    """Append a JSON line for each row; when this returns, a kill of the process loses none."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    # A lone surrogate, which a text from a server may have, is no UTF-8: it is kept escaped.
    file.write("".join(lines).encode("utf-8", "backslashreplace"))
    file.flush()


def lines_and_rest(file: IO[bytes]) -> tuple[list[bytes], bytes]:
    """Return the whole lines of a file from `open_alone`, and the part of one that a kill may have
    left at the end."""
    file.seek(0)
    lines = file.readlines()
    rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
    return lines, rest


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a file so that it is there as a whole or not at all."""
    file = pathlib.Path(path)
    half = file.with_name(f".{file.name}.half")
    half.write_bytes(text.encode("utf-8", "backslashreplace"))
    half.replace(file)


@contextlib.contextmanager
def folder_of(
    path: str | os.PathLike[str], settings: Mapping[str, Any], produced: Sequence[str]
) -> Iterator[pathlib.Path]:
    """Hold a run's folder, made where it is not there, for a run with these settings.

    Args:
        path: the folder.
        settings: JSON-able; kept in `settings.json`. A folder goes on only with the same ones.
        produced: patterns of the files that belong to the settings. While there is none with
            anything in it, the settings may change: a run that failed at once can be corrected.

    Raises:
        ValueError: it belongs to a run with other settings, which the message names, or to none
            that is known.
        BlockingIOError: another process works in it.
    """
    folder = pathlib.Path(path)
    with open_alone(folder / ".lock"):
        kept, settings = folder / "settings.json", json.loads(json.dumps(settings))
        there = [file for each in produced for file in folder.glob(each) if file.stat().st_size]
        if there and not kept.exists():
            raise ValueError(
                f"{folder} must be new, or have a run with its settings.json; it has "
                f"{there[0].name} without one. Name another folder."
            )
        if there:
            before = json.loads(kept.read_text(encoding="utf-8"))
            differing = [
                f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
                for name in sorted(before.keys() | settings)
                if before.get(name) != settings.get(name)
            ]
            if differing:
                raise ValueError(
                    f"{folder} has a run with other settings: {'; '.join(differing)}. Use those, "
                    "or name another folder."
                )
        else:
            write_whole(kept, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        yield folder
