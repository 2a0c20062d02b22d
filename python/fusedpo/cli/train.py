"""`fusedpo train`."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer
from rich.console import Group

from fusedpo.cli.command import Result


def train(
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG...",
            help="A .json or .yaml file; several are stages, each on the model of the one before.",
        ),
    ],
    output_dir: Annotated[
        str | None,
        typer.Option(help="In place of the file's; with several files the folder of all."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show TRL's and PEFT's arguments and the memory; write nothing."
        ),
    ] = False,
) -> Result:
    """Train from a file: SFT, DPO and its family, KTO, CPO, ORPO, SimPO."""
    from fusedpo.tools.train import plan_stages, train_stages

    with contextlib.redirect_stdout(sys.stderr):  # transformers prints what it logs
        run = plan_stages if dry_run else train_stages
        stages = run(configs, output_dir=output_dir)
    return Result(
        {"stages": [stage.as_dict() for stage in stages]},
        Group(*(stage.render() for stage in stages)),
    )
