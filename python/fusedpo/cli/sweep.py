"""`fusedpo sweep`."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from fusedpo.cli.command import Result


def sweep(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A .json or .yaml file, as for fusedpo train.")
    ],
    beta: Annotated[
        str | None, typer.Option(help="Values of beta, with commas between: 0.05,0.1,0.5")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="Losses, with commas between: sigmoid,ipo,simpo")
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option(help="The folder of the sweep, in place of the file's.")
    ] = None,
) -> Result:
    """Train over values of beta and losses on one reference store; killed, it goes on."""
    from fusedpo.tools.sweep import sweep as run

    betas = [_number(each) for each in _items(beta)]
    with contextlib.redirect_stdout(sys.stderr):  # transformers prints what it logs
        report = run(config, betas=betas, losses=_items(loss), output_dir=output_dir)
    return Result(report.as_dict(), report.render())


def _items(text: str | None) -> list[str]:
    return [each.strip() for each in (text or "").split(",") if each.strip()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--beta must be numbers with commas between; got {text!r}.") from None
