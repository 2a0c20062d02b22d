"""Every subcommand, registered with typer."""

from __future__ import annotations

from typing import Annotated

import typer

import fusedpo
from fusedpo.cli import (
    convert,
    diagnose,
    generate,
    iterate,
    judge,
    lint,
    pairs,
    plot,
    store,
    sweep,
    train,
)
from fusedpo.cli.command import command

_HELP = """Exact, fast preference optimisation, and the tools around it."""
_EPILOG = """Exit codes: 0 done; 1 it failed, or a check found something; 2 wrong usage; 130, 143 \
stopped by Ctrl-C, by SIGTERM (run it again to go on).

Score the reference once, look at the result, train with it:

fusedpo precompute --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --output refs/

fusedpo inspect refs/

FusedDPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", ref_store="refs/", ...)   in Python

Several processes share the work:

torchrun --nproc-per-node 8 -m fusedpo precompute --model ... --data ... --output refs/
"""

STORE = "The reference store"
BEFORE = "Before the training"
AFTER = "After the training"
_COMMANDS = (
    ("lint", BEFORE, lint.lint),
    ("convert", BEFORE, convert.convert),
    ("precompute", STORE, store.precompute),
    ("inspect", STORE, store.inspect),
    ("verify", STORE, store.verify),
    ("merge", STORE, store.merge),
    ("export", STORE, store.export),
    ("import", STORE, store.import_),
    ("prune", STORE, store.prune),
    ("train", "Training", train.train),
    ("sweep", "Training", sweep.sweep),
    ("plot", AFTER, plot.plot),
    ("diagnose", AFTER, diagnose.diagnose),
    ("generate", AFTER, generate.generate),
    ("pathologies", AFTER, generate.pathologies),
    ("judge", AFTER, judge.judge),
    ("pairs", AFTER, pairs.pairs),
    ("iterate", AFTER, iterate.iterate),
    ("doctor", "This installation", store.doctor),
)

app = typer.Typer(
    name="fusedpo",
    help=_HELP,
    epilog=_EPILOG,
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fusedpo {fusedpo.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _name, _panel, _function in _COMMANDS:
    app.command(_name, help=_function.__doc__, rich_help_panel=_panel)(command(_name, _function))
