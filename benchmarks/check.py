"""python -m benchmarks.check: has a kernel become slow? Ratios to torch's own, never times.

Each cell times ours and a yardstick of torch that does similar work on the same data, alternating,
on one thread; the ratio of the shortest times is compared with the one that was recorded for the
instruction set torch uses here (check_ratios.json). Other processes only lengthen times, and the
shortest of many hardly. A ratio above SLACK times the recorded one is measured anew, twice, before
it counts as slow. So a kernel that takes twice as long is found, and so is one that falls back to
the portable code. The pass over the logits dominates every cell but the last four, the matrix
products those. Takes about half a minute. `--record` writes the ratios of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import fusedpo
import torch
from fusedpo.reference import METRICS

from benchmarks import head_peers, logits_peers, losses
from benchmarks.common import Call, seconds_of
from benchmarks.head_problem import make_problem

RECORDED = pathlib.Path(__file__).with_name("check_ratios.json")
# Above what other processors and noise change a ratio by, below the 2 of a kernel twice as slow.
SLACK = 1.8
SECONDS = 1.5  # for the rounds of a cell
FEWEST = 25  # rounds
ATTEMPTS = 3


class Cell(NamedTuple):
    ours: Call
    yardstick: Call


# ---- cells --------------------------------------------------------------------------------------


def logits(dtype: torch.dtype, metrics: tuple[str, ...], backward: bool) -> Cell:
    """32 x 32,000 against torch's log_softmax into a buffer that exists."""
    p = logits_peers.make_problem(32, 32_000, dtype, torch.device("cpu"))
    peer = logits_peers.ours(metrics, inplace=backward)
    buffer = torch.zeros_like(p.logits)
    return Cell(
        Call(lambda: peer(p, backward), p.restore if backward else None),
        Call(lambda: torch.log_softmax(p.original, -1, out=buffer)),
    )


def head(dtype: str, kind: str, rows: int, vocabulary: int, size: int, softmax: bool) -> Cell:
    """Against the bare products in fp32, with a log_softmax of the logits where they are small."""
    p = make_problem(dtype, kind, vocabulary, rows=rows, size=size)
    products = head_peers.floor_fp32(p)
    scores = torch.randn(rows, vocabulary)
    buffer = torch.zeros_like(scores)

    def yardstick() -> None:
        products()
        if softmax:
            torch.log_softmax(scores, -1, out=buffer)

    return Cell(Call(head_peers.ours(p)), Call(yardstick))


def loss() -> Cell:
    """Three losses of 65,536 pairs with their gradients, against the formulas in plain torch."""
    names, weights = losses.LISTS["MPO"]
    b = losses.Batch(1 << 16, torch.float32, torch.device("cpu"))
    options = losses.options_of(b, names, weights)

    def gradients(value: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(value(), b.leaves)

    return Cell(
        Call(gradients(lambda: losses.fused(fusedpo, b, options).loss)),
        Call(gradients(lambda: losses.plain(b, names, weights)[0])),
    )


CELLS: dict[str, Callable[[], Cell]] = {
    "logits fp32 forward": lambda: logits(torch.float32, (), False),
    "logits fp32 forward, all outputs": lambda: logits(torch.float32, METRICS, False),
    "logits fp32 backward in place": lambda: logits(torch.float32, (), True),
    "logits bf16 forward": lambda: logits(torch.bfloat16, (), False),
    "logits bf16 backward in place": lambda: logits(torch.bfloat16, (), True),
    "losses": loss,
    "hidden fp32 frozen, H 8": lambda: head("fp32", "frozen", 64, 32_000, 8, True),
    "hidden fp32 trained, H 8": lambda: head("fp32", "trained", 64, 32_000, 8, True),
    "hidden fp32 nograd": lambda: head("fp32", "nograd", 128, 8192, 512, False),
    "hidden fp32 frozen": lambda: head("fp32", "frozen", 128, 8192, 512, False),
    "hidden fp32 trained": lambda: head("fp32", "trained", 128, 8192, 512, False),
    "hidden bf16 frozen": lambda: head("bf16", "frozen", 128, 8192, 512, False),
}


# ---- measuring and judging ----------------------------------------------------------------------


class Best(NamedTuple):
    """The shortest seconds of both so far."""

    ours: float = float("inf")
    yardstick: float = float("inf")

    @property
    def ratio(self) -> float:
        return self.ours / self.yardstick


def measured(cell: Cell, best: Best, seconds: float) -> Best:
    """`best` after alternating calls for about `seconds`."""
    stop = time.monotonic() + seconds
    rounds = 0
    while rounds < FEWEST or time.monotonic() < stop:
        best = Best(
            min(best.ours, seconds_of(cell.ours)), min(best.yardstick, seconds_of(cell.yardstick))
        )
        rounds += 1
    return best


def is_slow(ratio: float, recorded: float) -> bool:
    return ratio > SLACK * recorded


def run(name: str, recorded: float | None) -> float:
    """The cell's ratio; measured up to ATTEMPTS times, as long as it is slow."""
    cell = CELLS[name]()
    seconds_of(cell.ours)
    seconds_of(cell.yardstick)
    best = Best()
    for _ in range(ATTEMPTS):
        best = measured(cell, best, SECONDS)
        if recorded is not None and not is_slow(best.ratio, recorded):
            break
    return best.ratio


def ratios_here(all_recorded: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """What was recorded for the instruction set that torch uses on this processor, if anything."""
    return all_recorded.get(torch.backends.cpu.get_cpu_capability(), {})


def not_run(all_recorded: Mapping[str, dict[str, float]]) -> None:
    """Says that nothing was checked, and once more at the end of .ci/run."""
    text = (
        "NOT CHECKED: the speed of the kernels. torch uses "
        f"{torch.backends.cpu.get_cpu_capability()} here, ratios are recorded for "
        f"{', '.join(all_recorded) or 'nothing'}. `python -m benchmarks.check --record` records "
        "this machine's."
    )
    print(text)
    if log := os.environ.get("FUSEDPO_NOT_RUN"):
        with open(log, "a", encoding="utf-8") as file:
            print(text, file=file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument("--cells", help="comma-separated parts of their names; default all")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name}")
    options = parser.parse_args(arguments)
    parts = options.cells.split(",") if options.cells else [""]
    names = [name for name in CELLS if any(part in name for part in parts)]
    if not names:
        parser.error(f"--cells must be parts of {'; '.join(CELLS)}; got {options.cells}")
    # Whether the processor multiplies bf16 itself would decide the ratio; the kernels are the same.
    os.environ["FUSEDPO_BF16_GEMM"] = "widened"
    torch.set_num_threads(1)
    all_recorded = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    recorded = {} if options.record else ratios_here(all_recorded)
    if not recorded and not options.record:
        not_run(all_recorded)
        return 0
    info = json.loads(torch.ops.fusedpo.cpu_info())
    print(f"torch: {torch.backends.cpu.get_cpu_capability()}; fusedpo: {info}")
    found: dict[str, float] = {}
    slow = []
    for name in names:
        found[name] = run(name, recorded.get(name))
        text = f"{name:36}{found[name]:8.3f}"
        if name in recorded:
            text += f", recorded {recorded[name]:6.3f}: {found[name] / recorded[name]:5.2f}x"
            if is_slow(found[name], recorded[name]):
                slow.append(name)
                text += f"  SLOW, more than {SLACK}x"
        print(text, flush=True)
    if options.record:
        here = all_recorded.setdefault(torch.backends.cpu.get_cpu_capability(), {})
        here.update({name: round(ratio, 3) for name, ratio in found.items()})
        RECORDED.write_text(json.dumps(all_recorded, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {RECORDED}")
    missing = [] if options.record else [name for name in names if name not in recorded]
    if missing:
        print(f"not recorded, so not judged: {', '.join(missing)}; run with --record")
    return 1 if slow or missing else 0


if __name__ == "__main__":
    sys.exit(main())
