"""Records into a file, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

Records = Sequence[dict[str, Any]]


def check_output(path: str | os.PathLike[str], source: str | os.PathLike[str] | None) -> None:
    """Raises:
    ValueError: an ending that is not known, or the output is the file that is read.
    FileNotFoundError: its folder is not there.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in _WRITERS:
        raise ValueError(f"the output must end in {', '.join(_WRITERS)}; got {os.fspath(path)!r}.")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the output's folder must exist; no such folder: {folder}")
    if source is not None and os.path.exists(path) and os.path.samefile(path, source):
        raise ValueError(
            f"the output must not be the input, {os.fspath(source)}. Give it another name."
        )


def write_records(records: Records, path: str | os.PathLike[str]) -> None:
    """Write a .jsonl, .json or .parquet file; it appears, or is replaced, when it is complete.

    Raises:
        ValueError, OSError: see `check_output`; the disk is full.
    """
    check_output(path, None)
    target = os.path.realpath(path)  # through a link, which stays
    write = _WRITERS[os.path.splitext(target)[1].lower()]
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        with open(temporary, "xb") as file:
            write(records, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _jsonl(records: Records, file: BinaryIO) -> None:
    for record in records:
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _json(records: Records, file: BinaryIO) -> None:
    file.write(json.dumps(records, ensure_ascii=False, indent=2).encode() + b"\n")


def _parquet(records: Records, file: BinaryIO) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('writing Parquet needs pyarrow; pip install "fusedpo[tools]"') from error
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), file)


_WRITERS: dict[str, Callable[[Records, BinaryIO], None]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
