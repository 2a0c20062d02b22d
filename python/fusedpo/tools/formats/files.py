"""The records of a file, each with its line. A row that is wrong does not stop the others."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from .messages import is_message, is_messages
from .rows import FormatError

Found = tuple[int, dict[str, Any] | FormatError]  # line (in Parquet: row) from 1, and its record


def read_records(path: str) -> Iterator[Found]:
    """Yield (line, record), or (line, what is wrong with it), in the order of the file.

    Raises:
        FileNotFoundError, FormatError: no such file, an ending that is not known, a broken file.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in _READERS:
        raise FormatError(
            f"a data file must end in {', '.join(_READERS)}; got {os.path.basename(path)!r}."
        )
    return _READERS[ending](path)


def _jsonl(path: str) -> Iterator[Found]:
    with open(path, "rb") as file:
        # A binary file ends its lines at \n alone; str.splitlines would cut texts at U+2028.
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = _without_bom(line, path)
            if line.strip():
                yield number, _record_of_line(line)


def _without_bom(start: bytes, path: str) -> bytes:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FormatError(f"{path} must be UTF-8; it begins as UTF-16. Save it as UTF-8.")
    return start.removeprefix(b"\xef\xbb\xbf")


def _record_of_line(line: bytes) -> dict[str, Any] | FormatError:
    try:
        text = line.decode()
        record, end = _decode(text, _after_space(text, 0))
        if _after_space(text, end) < len(text):
            raise json.JSONDecodeError("something follows the object", text, end)
        return record
    except UnicodeDecodeError as error:
        return FormatError(f"must be UTF-8; byte {line[error.start]:#04x} at {error.start} is not")
    except json.JSONDecodeError as error:
        return FormatError(f"must be JSON; {error.msg} at character {error.pos}")
    except FormatError as error:
        return error


def _decode(text: str, at: int) -> tuple[dict[str, Any] | FormatError, int]:
    """Return the object at that place, or what is wrong with it, and where it ends.

    Raises:
        JSONDecodeError, FormatError: its end cannot be found.
    """
    wrong: list[str] = []

    def an_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            wrong.append(
                f"must have each name once; got {_repeated([n for n, _ in pairs])!r} twice"
            )
        return found

    def constant(name: str) -> None:
        wrong.append(f"must be JSON, which has no {name}; write null")

    decoder = json.JSONDecoder(object_pairs_hook=an_object, parse_constant=constant)
    try:
        value, end = decoder.raw_decode(text, at)
    except RecursionError:
        raise FormatError("must be JSON that can be read; it is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python reads no longer integers, as that would take very long
        raise FormatError("must have integers of fewer digits; one has thousands") from None
    return FormatError(wrong[0]) if wrong else _object(value), end


def _repeated(names: list[str]) -> str:
    """The first name that occurs a second time."""
    return next(name for index, name in enumerate(names) if name in names[:index])


def _object(value: Any) -> dict[str, Any] | FormatError:
    if isinstance(value, dict):
        return value
    return FormatError(f"must be a JSON object; got {json.dumps(value)[:40]}")


def _json(path: str) -> Iterator[Found]:
    with open(path, "rb") as file:
        data = _without_bom(file.read(), path)
    if data.lstrip().startswith(b"["):
        yield from _list(data, path)
    elif (only := _only_object(data)) is not None:
        yield only
    else:
        yield from _jsonl(path)  # which many call .json


def _list(data: bytes, path: str) -> Iterator[Found]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FormatError(f"{path}:{line}: must be UTF-8; byte {data[error.start]:#04x}") from None
    try:
        yield from _items(text, path)
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}:{error.lineno}: must be JSON; {error.msg}") from None


def _only_object(data: bytes) -> Found | None:
    """The object that is the whole file, over several lines perhaps; None if it is not."""
    try:
        text = data.decode()
        at = _after_space(text, 0)
        record, end = _decode(text, at)
    except ValueError:  # not UTF-8, not JSON
        return None
    return (text.count("\n", 0, at) + 1, record) if _after_space(text, end) == len(text) else None


def _items(text: str, path: str) -> Iterator[Found]:
    """The items of a JSON list, decoded one by one for the sake of their lines."""
    line, counted = 1, 0
    at = _after_space(text, text.index("[") + 1)
    closed = text.startswith("]", at)
    while not closed:
        line += text.count("\n", counted, at)
        counted = at
        try:
            record, at = _decode(text, at)
        except FormatError as error:
            raise FormatError(f"{path}:{line}: {error}") from None
        yield line, record
        at = _after_space(text, at)
        closed = text.startswith("]", at)
        if not closed and not text.startswith(",", at):
            raise json.JSONDecodeError("a comma or ] must follow", text, at)
        at = at if closed else _after_space(text, at + 1)
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("something follows the list", text, at + 1)


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _csv(path: str) -> Iterator[Found]:
    # Python's own reader: texts stay texts ("42", "NA"), and it knows the line.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            _check_names(names, path)
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield line, _record_of_cells(names, cells)
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} must be UTF-8; {error.reason} at byte {error.start}.") from None
    except csv.Error as error:
        raise FormatError(f"{path}:{line}: must be CSV; {error}.") from None
    finally:
        csv.field_size_limit(limit)


def _record_of_cells(names: list[str], cells: list[str]) -> dict[str, Any] | FormatError:
    if len(cells) != len(names):
        return FormatError(f"must have {len(names)} cells, as the first line; got {len(cells)}")
    return {name: _cell(name, text) for name, text in zip(names, cells, strict=True)}


def _cell(name: str, text: str) -> Any:
    """Messages (or a history of turns) where that is what a cell holds as JSON; else the text."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    history = name == "history" and isinstance(value, list)
    return value if value and (history or is_messages(value) or is_message(value)) else text


def _check_names(names: list[str], path: str) -> None:
    if len(set(names)) < len(names):
        raise FormatError(
            f"the columns of {path} must have different names; got {_repeated(names)!r} twice. "
            "Rename one of them."
        )


def _parquet(path: str) -> Iterator[Found]:
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {path}")
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f'reading {path} needs pyarrow; pip install "fusedpo[tools]"') from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise FormatError(f"{path} must be Parquet; {error}") from None
    _check_names(table.schema_arrow.names, path)
    row = 0
    for batch in table.iter_batches():
        for record in batch.to_pylist():
            row += 1
            yield row, record


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
