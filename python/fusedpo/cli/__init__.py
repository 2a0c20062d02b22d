"""The `fusedpo` command: one thin function for each subcommand; what they do is in the library.

Exit codes: 0 done; 1 it failed, or a check found something; 2 wrong usage; 130 and 143 interrupted
by Ctrl-C and by SIGTERM.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        from fusedpo.cli.app import app
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(
            f'the fusedpo command needs {error.name}: pip install "fusedpo[cli]"', file=sys.stderr
        )
        return 1
    try:
        app(arguments, prog_name="fusedpo")
    except SystemExit as stop:
        return int(stop.code or 0)
    raise AssertionError("typer always exits")
