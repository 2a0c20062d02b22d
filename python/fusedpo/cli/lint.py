"""`fusedpo lint`: checks a data set of preferences before the training."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fusedpo.cli import options as opt
from fusedpo.cli.command import Result
from fusedpo.cli.convert import Form


def lint(
    data: Annotated[
        str, typer.Argument(help="A .jsonl, .json, .csv or .parquet file of preferences.")
    ],
    *,
    form: Annotated[
        Form | None, typer.Option("--from", help="Its form. Default: recognised.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="M",
            help="The model that will be trained, for its tokenizer and chat template.",
        ),
    ] = None,
    max_length: opt.MaxLength = 1024,
    truncation_mode: opt.TruncationMode = "keep_start",
    fix: Annotated[
        str | None,
        typer.Option(
            metavar="OUT",
            help="Write a copy without the rows of removable findings (.jsonl, .json or .parquet).",
        ),
    ] = None,
    fail_on: Annotated[
        Literal["error", "warning", "never"],
        typer.Option(help="For which findings the exit code is 1."),
    ] = "error",
) -> Result:
    """Check a data set before training: what is wrong, where, and what to do about it."""
    from fusedpo.tools.lint import lint as run

    report = run(
        data,
        form=form,
        tokenizer=tokenizer,
        max_length=max_length or None,
        truncation_mode=truncation_mode,
        fail_on=fail_on,
        fix=fix,
    )
    return Result(report.as_dict(), report.render(), 1 if report.failed else 0)
