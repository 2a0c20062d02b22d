"""python -m benchmarks.head: log-probs from hidden states, against other heads and bare GEMMs.

Every contestant is verified against float64, then all are timed interleaved (contest.py). The floor
is the bare matrix products on the completion rows. A case is named by its dtype and what is
trained, and by what differs from 256 completion rows (N) that are 50 % of all positions (share)
under a head of 896 x 151,936 (H, V) on all cores (T): fp32-frozen, bf16-nograd-V32000-T1.
`--device cuda` measures other sizes, with options of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

from benchmarks import common, contest, head_peers, head_scalar_peers
from benchmarks.cases import Case, fields_of, options_of
from benchmarks.contest import Contest, Limits
from benchmarks.head_problem import DTYPES, HEADS, Problem, exact, make_problem, verify

PEERS = {
    "ours": head_peers.ours,
    "trl": head_peers.trl,
    "eager": head_peers.eager,
    "compile": head_peers.compiled,
    "torch_chunked": head_peers.torch_chunked,
    **head_scalar_peers.PEERS,
    "floor": head_peers.floor,
    "floor_fp32": head_peers.floor_fp32,
    "cast_weight": head_peers.cast_weight,
}
FLOORS = ("floor", "floor_fp32", "cast_weight")  # nothing to verify
GEMMS = {"nograd": 1, "frozen": 2, "trained": 3}


@dataclasses.dataclass(frozen=True)
class HeadCase(Case):
    WORDS = (DTYPES, HEADS)
    dtype: str
    head: str
    V: int = 151_936
    N: int = 256  # completion rows
    share: int = 50  # percent of the positions that are completion
    H: int = 896
    T: int = 0  # threads; 0: as many as torch takes

    def problem(self, vocabulary: int) -> Problem:
        return make_problem(
            self.dtype, self.head, vocabulary, rows=self.N, share=self.share, size=self.H
        )

    def peers(self, wanted: Iterable[str]) -> dict[str, Any]:
        """Of those wanted. Those whose calls take longest compete in fp32 with the sizes of the
        centre only, and not without a gradient; torch_chunked, half a minute, not when trained."""
        meaningless = {"fp32": ("floor_fp32", "cast_weight"), "bf16": ("cast_weight",), "amp": ()}
        left_out = set(meaningless[self.dtype])
        if self not in CENTRE or self.dtype != "fp32" or self.head == "nograd":
            left_out |= {"torch_chunked", *head_scalar_peers.PEERS}
        if self.head == "trained":
            left_out.add("torch_chunked")
        return {name: PEERS[name] for name in PEERS if name in wanted and name not in left_out}


CENTRE = [HeadCase(dtype, head) for dtype in DTYPES for head in HEADS]
# One axis at a time, from fp32-frozen-V32000, a vocabulary small enough to try 4096 rows.
AXES = [
    *(HeadCase("fp32", "frozen", V=vocabulary) for vocabulary in (32_000, 128_256, 256_000)),
    *(HeadCase("bf16", "frozen", V=vocabulary) for vocabulary in (32_000, 256_000)),
    *(HeadCase("fp32", "frozen", V=32_000, N=n) for n in (1, 16, 1024, 4096)),
    *(HeadCase("fp32", "frozen", V=32_000, share=share) for share in (25, 100)),
    *(HeadCase(dtype, "frozen", V=32_000, T=1) for dtype in ("fp32", "bf16")),
    *(HeadCase("fp32", head, V=32_000, H=64) for head in ("frozen", "trained")),
]


def run_case(case: HeadCase, peers: Iterable[str], limits: Limits) -> dict[str, Any]:
    def check(peer: str, p: Problem, answer: Any, truth: Any) -> dict[str, Any] | None:
        if peer in FLOORS:
            return None
        if peer in head_scalar_peers.PEERS:
            return head_scalar_peers.verify(peer, p, answer, truth)
        return verify(p, answer, truth)

    with common.threads(case.T) as threads:
        results = contest.run(
            Contest(case.V, case.problem, case.peers(peers), exact, check, lambda p: None), limits
        )
    return {
        **fields_of(case),
        "threads": threads,
        "gemms": GEMMS[case.head],
        "peers": results,
    }


def on_gpu(arguments: list[str]) -> bool:
    """Whether `--device cuda` is asked for, which has sizes, peers and options of its own."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_known_args(arguments)[0].device == "cuda"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if on_gpu(arguments):
        from benchmarks import head_cuda

        return head_cuda.main(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: more options"
    )
    groups = {"centre": CENTRE, "axes": AXES}
    options = options_of(parser, arguments, HeadCase, groups, tuple(PEERS))
    cases = (run_case(case, options.peers, options.limits) for case in options.cases)
    return contest.report("head", cases, options.out)


if __name__ == "__main__":
    sys.exit(main())
