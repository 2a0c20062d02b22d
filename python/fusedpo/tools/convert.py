"""Preference data from one form into another.

>>> import pathlib, tempfile
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> pair = PreferencePair("2+2?", "4", "5")
>>> report = convert([pair], folder / "pairs.json", to="sharegpt")
>>> report.rows_written, report.read_as
(1, {'plain': 1})
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .formats import (
    FormatError,
    LabelledCompletion,
    Loaded,
    PreferencePair,
    Problem,
    Row,
    Value,
    from_record,
    read_rows,
)
from .formats.display import excerpt, printable
from .formats.display import rows as rows_of
from .formats.renderers import Renderer, renderer_named, tokenizer_template
from .formats.saving import check_output, write_records
from .formats.targets import PAIRED, check_target, shape, write
from .formats.templates import HH
from .pairing import as_labelled, as_pairs

_SHOWN = 20  # problems in the text; --json has all


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` did."""

    source: str
    output: str
    form: str
    to: str
    template: str | None
    rows_read: int
    rows_written: int
    read_as: dict[str, int]  # template, plain or unknown -> rows of texts that were read so
    not_carried: dict[str, int]  # column -> rows that had it
    problems: list[Problem]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> str:
        by = f", template {self.template}" if self.template else ""
        lines = [
            f"{self.source}: {rows_of(self.rows_read)} of {self.form}",
            f"{self.output}: {rows_of(self.rows_written)} of {self.to}{by}",
        ]
        lines += [f"{rows_of(count)} {_how_read(how)}" for how, count in self.read_as.items()]
        if self.not_carried:
            names = ", ".join(
                f"{excerpt(name)} ({rows_of(n)})" for name, n in self.not_carried.items()
            )
            lines.append(f"not carried over: {names}")
        if self.problems:
            lines.append(f"{rows_of(len(self.problems))} could not be converted:")
            lines += [f"  {printable(str(problem))}" for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"  and {len(self.problems) - _SHOWN} more; --json lists all")
        return "\n".join(lines)


def convert(
    source: str | os.PathLike[str] | Iterable[Value],
    output: str | os.PathLike[str],
    *,
    to: str,
    form: str | None = None,
    template: str | None = None,
    tokenizer: str | None = None,
) -> ConvertReport:
    """Read preference data, and write it in another form.

    Args:
        source: a .jsonl, .json, .csv or .parquet file, or `PreferencePair`s and
            `LabelledCompletion`s.
        output: a .jsonl, .json or .parquet file; it appears when it is complete.
        to: "preference" (texts), "conversational", "sharegpt", "hh", "kto" (`messages` and
            `label`) or "unpaired" (`prompt`, `completion`, `label`, which TRL's KTOTrainer reads).
        form: the source's form; None: recognised.
        template: how "preference" and "unpaired" write conversations as texts: "hh", "chatml",
            "llama", "zephyr", "plain".
        tokenizer: the path or name of a tokenizer whose chat template is used instead.

    Returns:
        What was written, with a problem for each row that could not be.

    Raises:
        FormatError: no row could be converted, no known form; nothing is written.
        TypeError, ValueError, OSError, ImportError: wrong arguments, no such file, a missing
            library.
    """
    renderer = _renderer(template, tokenizer)
    check_target(to, renderer)
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        check_output(output, name)
        loaded = read_rows(name, form)
    else:
        if form is not None:
            raise ValueError(f"only a file has a form to name; got form={form!r} and values.")
        name = "the values"
        check_output(output, None)
        loaded = _given(source, name)
    rows, alone = as_pairs(loaded.rows) if to in PAIRED else (as_labelled(loaded.rows), [])
    problems = [*loaded.problems, *alone]
    records: list[dict[str, Any]] = []
    # Lines, as a pair may have become two rows.
    read_as: defaultdict[str, set[tuple[str, int]]] = defaultdict(set)
    for row in rows:
        try:
            value, how = shape(row.value, to, renderer)
            records.append(write(value, to))
        except FormatError as error:
            problems.append(Problem(row.file, row.line, str(error)))
            continue
        if how is not None and how != "messages":
            read_as[how].add((row.file, row.line))
    # Once each: what is wrong with a pair may be wrong with both of its completions.
    problems = sorted(dict.fromkeys(problems), key=lambda problem: problem.line)
    if not records:
        raise FormatError(f"no row of {name} could be converted. The first: {problems[0]}")
    write_records(records, output)
    return ConvertReport(
        source=name,
        output=os.fspath(output),
        form=loaded.form,
        to=to,
        template=_template_used(rows, to, renderer),
        rows_read=len(loaded.rows) + len(loaded.problems),
        rows_written=len(records),
        read_as={how: len(lines) for how, lines in read_as.items()},
        not_carried=loaded.not_carried,
        problems=problems,
    )


def _renderer(template: str | None, tokenizer: str | None) -> Renderer | None:
    if template is not None and tokenizer is not None:
        raise ValueError("either a template or a tokenizer writes the texts; got both.")
    if tokenizer is not None:
        return tokenizer_template(tokenizer)
    return None if template is None else renderer_named(template)


def _template_used(rows: list[Row], to: str, renderer: Renderer | None) -> str | None:
    if renderer is not None:
        return renderer.name
    by_default = to == "preference" and any(isinstance(row.value.prompt, list) for row in rows)
    return HH.name if by_default else None


def _given(values: Iterable[Value], name: str) -> Loaded:
    rows, problems = [], []
    for line, value in enumerate(values, start=1):
        if not isinstance(value, (PreferencePair, LabelledCompletion)):
            raise TypeError(
                "the values must be PreferencePair or LabelledCompletion; got a "
                f"{type(value).__name__}. from_record(row, form) makes one of a row."
            )
        record = dict(vars(value))
        try:
            form = _form_of(value)
            rows.append(Row(from_record(record, form), name, line, record))
        except FormatError as error:
            problems.append(Problem(name, line, str(error)))
    if not rows and not problems:
        raise FormatError("there must be at least one value to convert; got none.")
    return Loaded("values", rows, problems, {})


def _form_of(value: Value) -> str:
    if isinstance(value, PreferencePair):
        return "preference" if isinstance(value.prompt, str) else "conversational"
    return "kto"


def _how_read(how: str) -> str:
    if how == "plain":
        return "had no marks of turns: each prompt became one message of the user"
    if how == "unknown":
        return (
            "had marks of turns of a template that is not known here, as [INST] or ### "
            "Instruction: each prompt became one message of the user"
        )
    return f"had the marks of {how}"
