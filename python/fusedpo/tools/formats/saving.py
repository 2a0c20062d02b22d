"""Records into a file, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from .display import excerpt
from .rows import FormatError

Records = Sequence[dict[str, Any]]
Places = Sequence[str]


def check_output(path: str | os.PathLike[str], source: str | os.PathLike[str] | None) -> None:
    """Raises:
    ValueError: an ending that is not known, or the output is the file that is read.
    FileNotFoundError, IsADirectoryError: its folder is not there, or it is a folder itself.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in _WRITERS:
        raise ValueError(f"the output must end in {', '.join(_WRITERS)}; got {os.fspath(path)!r}.")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the output's folder must exist; no such folder: {folder}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"the output must be a file; {os.fspath(path)} is a folder.")
    if source is not None and os.path.exists(path) and os.path.samefile(path, source):
        raise ValueError(
            f"the output must not be the input, {os.fspath(source)}. Give it another name."
        )


def write_records(
    records: Records, path: str | os.PathLike[str], places: Sequence[str] | None = None
) -> None:
    """Write a .jsonl, .json or .parquet file; it appears, or is replaced, when it is complete.

    Args:
        records: one for each row. In Parquet a column that a row lacks is null there.
        path: the file.
        places: where each record comes from, for errors; None: its number, from 1.

    Raises:
        FormatError: a value that such a file cannot hold; the message names its place and column.
        ValueError, OSError: see `check_output`; the disk is full.
    """
    check_output(path, None)
    target = os.path.realpath(path)  # through a link, which stays
    write = _WRITERS[os.path.splitext(target)[1].lower()]
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        with open(temporary, "xb") as file:
            write(records, file, places or [f"row {n}" for n in range(1, len(records) + 1)])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _jsonl(records: Records, file: BinaryIO, places: Places) -> None:
    for record, place in zip(records, places, strict=True):
        file.write(_json_of(record, place, None) + b"\n")


def _json(records: Records, file: BinaryIO, places: Places) -> None:
    items = [_json_of(*each, 2) for each in zip(records, places, strict=True)]
    lines = b",\n".join(items).replace(b"\n", b"\n  ")
    file.write(b"[\n  " + lines + b"\n]\n" if items else b"[]\n")


def _json_of(record: dict[str, Any], place: str, indent: int | None) -> bytes:
    try:
        return _dumped(record, indent)
    except (TypeError, ValueError, RecursionError):
        for name, value in record.items():
            try:
                _dumped({name: value}, indent)
            except (TypeError, ValueError, RecursionError) as error:
                raise _unwritable(place, name, value, error, "JSON") from None
        raise


def _dumped(record: dict[str, Any], indent: int | None) -> bytes:
    # Not NaN, which Python alone would write and read.
    return json.dumps(record, ensure_ascii=False, indent=indent, allow_nan=False).encode()


def _parquet(records: Records, file: BinaryIO, places: Places) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('writing Parquet needs pyarrow; pip install "fusedpo[tools]"') from error

    def array(values: list[Any]) -> Any:
        return pyarrow.array(values, from_pandas=False)

    # Of all records: one that came later may have more.
    names = dict.fromkeys(name for record in records for name in record)
    columns = {}
    for name in names:
        values = [record.get(name) for record in records]
        try:
            columns[name] = array(values)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
            at, reason = _first_that_fails(array, values)
            raise _unwritable(places[at], name, values[at], reason, "Parquet") from None
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    except pyarrow.ArrowException as error:
        raise FormatError(f"Parquet cannot hold these rows: {error}. Write .jsonl.") from None


def _first_that_fails(
    array: Callable[[list[Any]], Any], values: list[Any]
) -> tuple[int, Exception]:
    """Index of the value that does not go with those before it, and why."""
    good, bad = 0, len(values)  # so many values of the beginning are fine, and are not
    told: Exception = ValueError("the column cannot be written")
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            array(values[:middle])
            good = middle
        except Exception as error:  # pyarrow's, or Python's own
            bad, told = middle, error
    return bad - 1, told


def _unwritable(place: str, name: str, value: Any, error: Exception, kind: str) -> FormatError:
    other = ".parquet" if kind == "JSON" else ".jsonl"
    return FormatError(
        f"{place}: the column {excerpt(name)} cannot be written as {kind}: {excerpt(repr(value))} "
        f"({excerpt(str(error))}). Change it or leave the column out, or try {other}."
    )


_WRITERS: dict[str, Callable[[Records, BinaryIO, Places], None]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
