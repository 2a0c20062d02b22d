"""python -m benchmarks.logits_cpu: log-probs and metrics of logits that exist, on a CPU.

Every contestant is verified against float64, then all are timed interleaved (contest.py). The floor
is the bytes that must move, as torch moves them in the same run: one read going forward; going
backward one read more, and a write of the gradient, elsewhere or in place. The read is the fastest
of several reductions. A case is named by its pass and dtype and by what differs from 256 rows (N),
all of them completion (share), of 151,936 logits (V) on all cores (T): forward-fp32,
backward-bf16-V32000-T1. The forward pass is without gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fusedpo.reference import METRICS
from torch import Tensor

from benchmarks import common, contest
from benchmarks.cases import Case, fields_of, options_of
from benchmarks.contest import Contest, Limits
from benchmarks.logits_peers import (
    Peer,
    Problem,
    compiled,
    logps_of,
    make_problem,
    ours,
    outputs_of,
    plain,
    trl_separate,
    verify,
)

PEERS = (
    "ours", "ours_all", "ours_inplace", "ours_all_inplace", "eager", "compile", "compile_all",
    "trl", "floor", "floor_inplace",
)  # fmt: skip
PASSES = ("forward", "backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Root mean square in nats; relative for the gradient. Plain expressions round log_softmax of bf16
# logits, and its sums, to bf16; ours rounds the gradient only.
TOLERANCES = {
    "fp32": {"outputs": 1e-4, "is_top1": 0.0, "gradient": 1e-4},
    "bf16": {"outputs": 0.5, "is_top1": 0.05, "gradient": 3e-2},
    "bf16 ours": {"outputs": 1e-4, "is_top1": 0.0, "gradient": 4e-3},
}
# The same bytes as wider or narrower numbers: which is read fastest differs between machines.
READERS: dict[str, Callable[[Tensor], Any]] = {
    "sum of float32": lambda x: x.view(torch.float32).sum(),
    "sum of float64": lambda x: x.view(torch.float64).sum(),
    "sum of int64": lambda x: x.view(torch.int64).sum(),
    "maximum of int32": lambda x: x.view(torch.int32).max(),
}


@dataclasses.dataclass(frozen=True)
class LogitsCase(Case):
    WORDS = (PASSES, tuple(DTYPES))
    way: str
    dtype: str
    V: int = 151_936
    N: int = 256  # completion rows
    share: int = 100  # percent of the rows that are completion
    T: int = 0  # threads; 0: as many as torch takes

    def problem(self, vocabulary: int) -> Problem:
        rows = self.N * 100 // self.share
        return make_problem(
            rows, vocabulary, DTYPES[self.dtype], torch.device("cpu"), share=self.share
        )


CENTRE = [LogitsCase(way, dtype) for dtype in DTYPES for way in PASSES]
AXES = [
    LogitsCase(way, "fp32", **field)
    for field in (
        *({"V": vocabulary} for vocabulary in (32_000, 128_256, 256_000)),
        *({"V": 32_000, "N": rows} for rows in (1, 16, 1024, 4096)),
        *({"V": 32_000, "share": share} for share in (25, 50)),
        {"T": 1},
    )
    for way in PASSES
]


@functools.lru_cache(maxsize=1)
def fastest_reader() -> str:
    x = torch.ones(1 << 25)
    calls = {name: common.Call(functools.partial(read, x)) for name, read in READERS.items()}
    for call in calls.values():
        call.run()
    times = common.interleave(calls, 5)
    return min(times, key=lambda name: min(times[name]))


def floor(backward: bool, inplace: bool) -> Callable[[Problem], Callable[[], None]]:
    """Reads the logits, and going backward reads them again and writes as much."""

    def make(p: Problem) -> Callable[[], None]:
        read = READERS[fastest_reader()]
        target = p.logits if inplace else torch.zeros_like(p.logits) if backward else None

        def call() -> None:
            read(p.logits)
            if target is not None:
                torch.neg(p.logits, out=target)

        return call

    return make


def peers_of(case: LogitsCase) -> dict[str, Callable[[Problem], Callable[[], Any]]]:
    """Forward: log-probs alone, and all five outputs. Backward: the gradient of the log-probs."""
    torch._dynamo.reset()
    backward = case.way == "backward"
    functions: dict[str, Peer] = {
        "ours": ours(),
        "eager": plain(logps_of),
        "compile": compiled(logps_of),
        "trl": plain(trl_separate),
    }
    if backward:
        functions |= {"ours_inplace": ours(inplace=True)}
        functions |= {"ours_all_inplace": ours(METRICS, inplace=True)}
    else:
        functions |= {"ours_all": ours(METRICS), "compile_all": compiled(outputs_of)}

    def maker(function: Peer) -> Callable[[Problem], Callable[[], Any]]:
        return lambda p: functools.partial(function, p, backward)

    made = {name: maker(function) for name, function in functions.items()}
    made["floor"] = floor(backward, inplace=False)
    return made | ({"floor_inplace": floor(backward, inplace=True)} if backward else {})


def run_case(case: LogitsCase, wanted: Iterable[str], limits: Limits) -> dict[str, Any]:
    def check(peer: str, p: Problem, answer: Any, truth: None) -> dict[str, Any] | None:
        if peer.startswith("floor"):
            return None
        stricter = f"{case.dtype} ours" if peer.startswith("ours") else ""
        return verify(p, answer, TOLERANCES.get(stricter, TOLERANCES[case.dtype]))

    def before(p: Problem) -> Callable[[], None] | None:
        """Logits over which a gradient was written are restored, for every contestant alike."""
        return p.restore if case.way == "backward" else None

    with common.threads(case.T) as threads:
        peers = {name: maker for name, maker in peers_of(case).items() if name in wanted}
        results = contest.run(
            Contest(case.V, case.problem, peers, lambda p: None, check, before), limits
        )
    rows = case.N * 100 // case.share
    return {
        **fields_of(case),
        "threads": threads,
        "bytes": rows * case.V * DTYPES[case.dtype].itemsize,
        "reader": fastest_reader(),
        "peers": results,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logits_cpu", description=__doc__)
    options = options_of(parser, arguments, LogitsCase, {"centre": CENTRE, "axes": AXES}, PEERS)
    cases = (run_case(case, options.peers, options.limits) for case in options.cases)
    return contest.report("logits", cases, options.out)


if __name__ == "__main__":
    sys.exit(main())
