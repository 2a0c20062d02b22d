"""`fusedpo convert`: preference data from one form into another."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fusedpo.cli.command import Result

Form = Literal["preference", "conversational", "sharegpt", "hh", "kto", "instruction"]
Target = Literal["preference", "conversational", "sharegpt", "hh", "kto", "unpaired"]
Template = Literal["hh", "chatml", "llama", "zephyr", "plain"]


def convert(
    data: Annotated[
        str, typer.Argument(metavar="IN", help="A .jsonl, .json, .csv or .parquet file.")
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="A .jsonl, .json or .parquet file.")],
    to: Annotated[
        Target,
        typer.Option(
            help="The form to write. preference: texts; kto: messages and label; unpaired: prompt, "
            "completion and label."
        ),
    ],
    form: Annotated[
        Form | None, typer.Option("--from", help="The form of IN. Default: recognised.")
    ] = None,
    template: Annotated[
        Template | None,
        typer.Option(
            help="How conversations become texts, in preference and unpaired. Default: preference "
            "as hh, texts as they are."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="M", help="Write texts by this tokenizer's chat template: a path or Hub name."
        ),
    ] = None,
) -> Result:
    """Convert preference data from one form into another."""
    from fusedpo.tools.convert import convert as run

    report = run(data, output, to=to, form=form, template=template, tokenizer=tokenizer)
    return Result(report.as_dict(), report.render(), 1 if report.problems else 0)
