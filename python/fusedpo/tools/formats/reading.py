"""A file of preference data, read whole: its form, and each row as a value or a problem."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from .columns import Columns
from .display import excerpt, listed
from .files import read_records
from .forms import FORMS, Form, form_named
from .messages import is_messages
from .rows import FormatError, Loaded, Problem, Row

Record = dict[str, Any]
# Share of the rows: so few of another form are mistakes in one data set, and no second one.
_FEW = 0.1


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
        columns = Columns(record)
        try:
            row = Row(chosen_form.parse(columns), file, line, record)
        except FormatError as error:
            problems.append(Problem(file, line, str(error)))
            continue
        rows.append(row)
        not_carried.update(columns.unread())
    problems.sort(key=lambda problem: problem.line)
    return Loaded(chosen_form.name, rows, problems, dict(not_carried))


def _recognise(file: str, records: list[tuple[int, Record]]) -> Form:
    first_lines: dict[tuple[str, ...], int] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    for line, record in records:
        names = tuple(form.name for form in FORMS.values() if form.matches(record))
        if names:
            counts[names] += 1
            first_lines.setdefault(names, line)
    if not counts:
        raise FormatError(_unknown(file, *records[0]))
    names, count = counts.most_common(1)[0]
    if len(names) > 1 or counts.total() - count > _FEW * counts.total():
        seen = "; ".join(
            f"{' or '.join(names)} in {counts[names]}, the first in line {first_lines[names]}"
            for names in counts
        )
        raise FormatError(
            f"all rows of {file} must have one form; got {seen}. Name the form that is meant "
            "(--from); rows that are not of it are reported."
        )
    return FORMS[names[0]]


def _unknown(file: str, line: int, record: Record) -> str:
    looked_for = "\n".join(f"  {form.name}: {form.looks_like}" for form in FORMS.values())
    return (
        f"{file} has no known form. Its first row (line {line}) has: "
        f"{listed(record) or 'no columns'}. Looked for:\n{looked_for}\n{_remedy(record)}"
    )


def _remedy(record: Record) -> str:
    for name, value in record.items():
        holds_rows = isinstance(value, list) and value and isinstance(value[0], dict)
        if holds_rows and not is_messages(value):
            return f"If {excerpt(name)} holds the rows, keep its list alone in the file."
    return "Rename the columns, or name the form (--from) to see what is wrong in each row."
