"""`fusedpo plot`."""

from __future__ import annotations

from typing import Annotated

import typer

from fusedpo.cli.command import Result

RUN_HELP = (
    "A run of any trainer of TRL: its folder, one of its checkpoints, or a trainer_state.json."
)


def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help=RUN_HELP)],
    output: Annotated[
        str, typer.Option(metavar="FILE", help="Where to: .png or .svg.")
    ] = "runs.png",
) -> Result:
    """Draw what runs logged: losses, accuracies, margins, rewards, log-probs, entropy, lengths."""
    from fusedpo.tools.plot import plot as draw

    report = draw(runs, output)
    return Result(report.as_dict(), report.render())
