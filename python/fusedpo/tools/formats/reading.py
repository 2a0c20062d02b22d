"""A file of preference data, read whole: its form, and each row as a value or a problem."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from .files import read_records
from .forms import FORMS, Form, form_named
from .messages import KEYS
from .parsers import Record
from .rows import FormatError, Loaded, Problem, Row

_MESSAGE_KEYS = {key for keys in KEYS for key in keys}


def read_rows(path: str | os.PathLike[str], form: str | None = None) -> Loaded:
    """Read preference data of any form.

    Args:
        path: a .jsonl, .json, .csv or .parquet file.
        form: a name in `FORMS`; None: recognised from the columns.

    Returns:
        The rows as values, and a problem for each row that could not be read.

    Raises:
        FileNotFoundError: no such file.
        FormatError: an unknown ending, a broken file, no rows, no known form, or several.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "pairs.jsonl")
    >>> row = '{"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}'
    >>> _ = file.write_text(row + '\\n{"prompt": 1}\\n')
    >>> loaded = read_rows(file)
    >>> loaded.form, len(loaded.rows), loaded.problems[0].line, loaded.problems[0].reason
    ('preference', 1, 2, 'prompt must be a text; got 1')
    """
    file = os.fspath(path)
    chosen_form = None if form is None else form_named(form)
    records: list[tuple[int, Record]] = []
    problems: list[Problem] = []
    for line, record in read_records(file):
        if isinstance(record, FormatError):
            problems.append(Problem(file, line, str(record)))
        else:
            records.append((line, record))
    if not records:
        told = f" The first problem: {problems[0]}." if problems else ""
        raise FormatError(f"{file} must have at least one row; got none.{told}")
    chosen_form = chosen_form or _recognise(file, records)
    rows = []
    not_carried: Counter[str] = Counter()
    for line, record in records:
        try:
            row = Row(chosen_form.parse(_present(record)), file, line, record)
        except FormatError as error:
            problems.append(Problem(file, line, str(error)))
            continue
        rows.append(row)
        not_carried.update(_not_carried(_present(record), chosen_form))
    problems.sort(key=lambda problem: problem.line)
    return Loaded(chosen_form.name, rows, problems, dict(not_carried))


def _present(record: Record) -> Record:
    """A column that holds nothing is as good as none."""
    return {name: value for name, value in record.items() if value is not None}


def _recognise(file: str, records: list[tuple[int, Record]]) -> Form:
    first_lines: dict[tuple[str, ...], int] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    for line, record in records:
        names = tuple(form.name for form in FORMS.values() if form.matches(_present(record)))
        if names:
            counts[names] += 1
            first_lines.setdefault(names, line)
    if not counts:
        raise FormatError(_unknown(file, *records[0]))
    if len(counts) > 1 or len(next(iter(counts))) > 1:
        seen = "; ".join(
            f"{' or '.join(names)} in {counts[names]}, the first in line {first_lines[names]}"
            for names in counts
        )
        raise FormatError(
            f"all rows of {file} must have one form; got {seen}. Name the form that is meant "
            "(--from); rows that are not of it are reported."
        )
    return FORMS[next(iter(counts))[0]]


def _unknown(file: str, line: int, record: Record) -> str:
    looked_for = "\n".join(f"  {form.name}: {form.looks_like}" for form in FORMS.values())
    return (
        f"{file} has no known form. Its first row (line {line}) has: "
        f"{', '.join(record) or 'no columns'}. Looked for:\n{looked_for}\n"
        "Rename the columns, or name the form (--from) to see what is wrong in each row."
    )


def _not_carried(record: Record, form: Form) -> set[str]:
    """Names of what a row has and its value does not hold: columns, and keys of messages."""
    names = set(record) - form.columns
    for column in set(record) & form.columns:
        names.update(f"{column}[].{key}" for key in _other_keys(record[column]))
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
