"""python -m benchmarks.tiles: how wide a tile of the vocabulary should be, on a CPU.

linear_token_logps forms logits tile by tile (csrc/ops/linear_logps_cpu.cpp). A narrow tile costs
calls, a wide one leaves the cache between its matrix product and the pass over it. Contestants are
ours with tiles of fixed widths, the width that it chooses itself, and the bare products. Each is
verified before it is timed.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from fusedpo import logps

from benchmarks import contest, head_peers
from benchmarks.cases import fields_of
from benchmarks.contest import Contest, Limits
from benchmarks.head import HeadCase
from benchmarks.head_problem import Answer, Problem, exact, verify

WIDTHS = (256, 512, 1024, 2048, 4096)
CASES = ("fp32-frozen", "fp32-trained", "fp32-frozen-V32000-N2048", "fp32-frozen-V32000-H64")


def with_width(width: int) -> Callable[[Problem], Callable[[], Answer]]:
    def prepare(p: Problem) -> Callable[[], Answer]:
        ours = head_peers.ours(p)

        def call() -> Answer:
            with mock.patch.object(logps, "_vocab_tile", return_value=width):
                return ours()

        return call

    return prepare


PEERS: dict[str, Any] = {f"ours_{width}": with_width(width) for width in WIDTHS}
PEERS |= {"ours": head_peers.ours, "floor": head_peers.floor}


def run_case(case: HeadCase, limits: Limits) -> dict[str, Any]:
    def check(peer: str, p: Problem, answer: Any, truth: Any) -> dict[str, Any] | None:
        return None if peer == "floor" else verify(p, answer, truth)

    chosen = logps._vocab_tile(case.H, "cpu")
    peers = contest.run(Contest(case.V, case.problem, PEERS, exact, check, lambda _: None), limits)
    return {**fields_of(case), "chosen_width": chosen, "peers": peers}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help="benchmarks.head's names")
    parser.add_argument("--out", type=pathlib.Path, help="JSON; default in results/<machine>/")
    parser.add_argument("--seconds", type=float, default=40.0, help="for a case's timed rounds")
    options = parser.parse_args(arguments)
    try:
        cases = [HeadCase.parse(name) for name in options.cases.split(",")]
    except ValueError as error:
        parser.error(str(error))
    limits = Limits(60.0, options.seconds, (3, 31))
    return contest.report("tiles", (run_case(case, limits) for case in cases), options.out)


if __name__ == "__main__":
    sys.exit(main())
