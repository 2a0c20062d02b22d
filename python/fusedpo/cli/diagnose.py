"""`fusedpo diagnose`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fusedpo.cli import options as opt
from fusedpo.cli.command import Result
from fusedpo.cli.plot import RUN_HELP

PAIRS = "Score single pairs, to see whether margins follow lengths"


def diagnose(
    run: Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)],
    beta: Annotated[
        float | None,
        typer.Option(metavar="B", help="Of the run, where no training_args.bin was saved with it."),
    ] = None,
    fail_on: Annotated[
        Literal["error", "warning", "never"],
        typer.Option(help="For which findings the exit code is 1."),
    ] = "error",
    data: Annotated[
        str | None, typer.Option(metavar="D", rich_help_panel=PAIRS, help=opt.DATA_HELP)
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="R",
            rich_help_panel=PAIRS,
            help="The reference: a model, or a store with the data's log-probs. Default, for an "
            "adapter: its base model.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="M",
            rich_help_panel=PAIRS,
            help="The trained model or adapter. Default: the one in RUN.",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="S", rich_help_panel=PAIRS, help="Which split.")
    ] = None,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=PAIRS, help="Only the first N pairs.")
    ] = 500,
) -> Result:
    """Say what is wrong with a run, by what it logged: the evidence and the fix."""
    from fusedpo.tools.diagnose import diagnose as examine
    from fusedpo.tools.runs import read_run

    read = read_run(run)
    pairs = None
    if data is not None:
        from fusedpo.tools.pair_scores import score_run

        pairs = score_run(
            read, data, beta=beta, reference=reference, policy=model, split=split, limit=limit
        )
    elif reference is not None or model is not None or split is not None:
        raise ValueError("--reference, --model and --split are for scoring pairs: name --data, too")
    report = examine(read, beta=beta, pairs=pairs)
    return Result(report.as_dict(), report.render(), 1 if report.fails(fail_on) else 0)
