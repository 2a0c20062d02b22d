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

    def peers(self) -> dict[str, Any]:
        """Liger where the sizes are the centre's: it is never the fastest and takes long."""
        absent = {"fp32": ("floor_fp32", "cast_weight"), "bf16": ("cast_weight",), "amp": ()}
        left_out = list(absent[self.dtype])
        if self not in CENTRE:
            left_out += head_scalar_peers.PEERS
        return {peer: maker for peer, maker in PEERS.items() if peer not in left_out}


CENTRE = [HeadCase(dtype, head) for dtype in DTYPES for head in HEADS]
# One axis at a time, from fp32-frozen-V32000, a vocabulary small enough to try 4096 rows.
AXES = [
    *(HeadCase(d, "frozen", V=v) for d in ("fp32", "bf16") for v in (32_000, 128_256, 256_000)),
    *(HeadCase("fp32", "frozen", V=32_000, N=n) for n in (1, 16, 1024, 4096)),
    *(HeadCase("fp32", "frozen", V=32_000, share=share) for share in (25, 100)),
    *(HeadCase(dtype, "frozen", V=32_000, T=1) for dtype in ("fp32", "bf16")),
    *(HeadCase("fp32", head, V=32_000, H=64) for head in ("frozen", "trained")),
]


def run_case(case: HeadCase, limits: Limits) -> dict[str, Any]:
    def check(peer: str, p: Problem, answer: Any, truth: Any) -> dict[str, Any] | None:
        if peer in FLOORS:
            return None
        if peer in head_scalar_peers.PEERS:
            return head_scalar_peers.verify(peer, p, answer, truth)
        return verify(p, answer, truth)

    with common.threads(case.T) as threads:
        peers = contest.run(
            Contest(case.V, case.problem, case.peers(), exact, check, lambda p: None), limits
        )
    return {
        **fields_of(case),
        "threads": threads,
        "gemms": GEMMS[case.head],
        "peers": peers,
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
    options = options_of(parser, arguments, HeadCase, {"centre": CENTRE, "axes": AXES})
    cases = (run_case(case, options.limits) for case in options.cases)
    return contest.report("head", cases, options.out)


if __name__ == "__main__":
    sys.exit(main())
