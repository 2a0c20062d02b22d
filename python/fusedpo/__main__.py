"""`python -m fusedpo`: what was built, what is loaded, what will run where, and why not.

Exit code 0 when nothing is broken (a pure-Python install is not), 1 when something built fails.
With a command (`python -m fusedpo precompute ...`) it is the `fusedpo` command, for `torchrun -m`.
"""

from __future__ import annotations

import argparse
import json
import sys

from fusedpo import _doctor


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and not arguments[0].startswith("-"):
        from fusedpo import cli

        return cli.main(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m fusedpo",
        description="Tell what is built, loaded and supported, and what to do about the rest. "
        "With a command, do what the fusedpo command does: fusedpo --help lists them.",
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    options = parser.parse_args(arguments)
    report = _doctor.examine()
    print(json.dumps(report, indent=2) if options.json else _doctor.render(report))
    return 1 if report["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
