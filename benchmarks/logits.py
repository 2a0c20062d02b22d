"""python -m benchmarks.logits: log-probs and metrics of logits that exist, on a GPU.

8192 x 151936 bf16 logits (2.5 GB). Peers: the plain expressions that TRL's trainers used before
they had kernels, torch.compile of them, and TRL's Triton kernel. Verified against float64 on a
sample of rows; then CUDA events, cold L2, interleaved rounds. The floor is the bytes that must
move: one read going forward, one read and one write going backward, at the bandwidth measured here
and at 4.3 TB/s. `--rehearse` runs the same code on a CPU with a small size; that measures nothing.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import torch
from fusedpo.reference import METRICS

from benchmarks import common, device, judge, targets_gpu
from benchmarks.logits_peers import (
    Peer,
    Problem,
    compiled,
    make_problem,
    ours,
    outputs_of,
    plain,
    trl_triton,
    verify,
)

ROWS, VOCABULARY = 8192, 151_936
REHEARSAL = (48, 1000)
# Root mean square in nats; relative for the gradient, which is rounded to bf16. The plain
# expression rounds log_softmax of bf16 logits, and its sums, to bf16.
TOLERANCES = {
    "ours": {"outputs": 2e-5, "is_top1": 0.0, "gradient": 4e-3},
    "trl_triton": {"outputs": 1e-4, "is_top1": 0.0, "gradient": 1e-2},
    "eager": {"outputs": 0.5, "is_top1": 0.05, "gradient": 3e-2},
    "compile": {"outputs": 0.5, "is_top1": 0.05, "gradient": 3e-2},
}

# pass -> (goes backward, reads and writes of the logits, peers)
ALL: dict[str, Peer] = {
    "ours": ours(METRICS),
    "trl_triton": trl_triton,
    "eager": plain(outputs_of),
    "compile": compiled(outputs_of),
}
PASSES: dict[str, tuple[bool, int, dict[str, Peer]]] = {
    "forward, all outputs": (False, 1, ALL),
    "forward + backward in place": (True, 3, ALL | {"ours": ours(METRICS, inplace=True)}),
    "forward + backward": (True, 3, {"ours": ours(METRICS), "trl_triton": trl_triton}),
    "forward, logps and entropy": (
        False,
        1,
        {"ours": ours(("entropy",)), "trl_triton": trl_triton},
    ),
}


def run_pass(
    name: str,
    p: Problem,
    peers: list[str],
    rounds: int,
    place: torch.device,
    rates: dict[str, float],
) -> dict[str, Any]:
    backward, moves, contestants = PASSES[name]
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, common.Call] = {}
    for peer in (n for n in contestants if n in peers):
        function = contestants[peer]
        # An in-place backward has overwritten the logits; copying them back is not timed.
        call = common.Call(
            lambda f=function: f(p, backward),
            p.restore if backward else None,
        )
        try:
            p.restore()
            results[peer] = {"verified": verify(p, call.run(), TOLERANCES[peer])}
            if results[peer]["verified"]["ok"]:
                results[peer]["memory"] = device.extra_bytes(call, place)
                calls[peer] = call
        except Exception as error:  # a finding about the peer
            if peer == "ours":
                raise
            results[peer] = {"not_run": common.why(error)}
    for peer, times in device.interleave(calls, rounds, place).items():
        results[peer].update(times)
    size = device.bytes_of(p.original)
    # A read at the rate of a read, a read with a write at that of a copy.
    measured = size / rates["read_bytes_per_s"]
    measured += (moves - 1) * size / rates["copy_bytes_per_s"] if moves > 1 else 0
    floor = {"bytes": moves * size, "at_4.3_TB_s": moves * size / device.NOMINAL_BANDWIDTH,
             "at_measured_bandwidth": measured}  # fmt: skip
    for result in results.values():
        if "median_s" in result:
            result["bytes_per_s"] = moves * size / result["median_s"]
            result["times_floor"] = result["median_s"] / measured
    return {"floor_s": floor, "peers": results}


def print_pass(name: str, found: dict[str, Any]) -> None:
    floor = found["floor_s"]
    print(
        f"\n{name}: floor {1e3 * floor['at_measured_bandwidth']:.3f} ms at the bandwidth measured, "
        f"{1e3 * floor['at_4.3_TB_s']:.3f} ms at 4.3 TB/s"
    )
    print(f"{'':12}{'median ms':>11}{'min':>9}{'max':>9}{'TB/s':>7}{'x floor':>9}{'extra MB':>10}")
    for peer, result in found["peers"].items():
        if "median_s" not in result:
            print(f"{peer:12}  {common.excuse(result)}")
            continue
        times = "".join(f"{1e3 * result[f]:{w}.3f}" for f, w in
                        (("median_s", 11), ("min_s", 9), ("max_s", 9)))  # fmt: skip
        rate = f"{result['bytes_per_s'] / 1e12:7.2f}{result['times_floor']:9.2f}"
        extra = f"{result['memory']['extra_bytes'] / 1e6:10.0f}"
        print(f"{peer:12}{times}{rate}{extra}  {common.errors_of(result)}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logits")
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="on CPU, tiny: measures nothing")
    parser.add_argument("--quick", action="store_true", help="9 rounds instead of 31")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--peers", default="ours,trl_triton,eager,compile")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (9 if options.quick else 31)
    options.peers = options.peers.split(",")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    place = device.choose(options.rehearse)
    rates = device.bandwidth(place)
    size = REHEARSAL if options.rehearse else (ROWS, VOCABULARY)
    content: dict[str, Any] = {
        "benchmark": "logits",
        "rehearsal": options.rehearse,
        "environment": common.environment() | {"gpu": device.facts(place)},
        "size": {"rows": size[0], "V": size[1], "dtype": "bfloat16"},
        "bandwidth": rates,
        "passes": {},
    }
    path = (
        options.out or common.RESULTS / common.device_name(content["environment"]) / "logits.json"
    )
    p = make_problem(*size, torch.bfloat16, place)
    correct = True
    for name in PASSES:
        found = run_pass(name, p, options.peers, options.rounds, place, rates)
        content["passes"][name] = found
        print_pass(name, found)
        common.write(path, content)
        correct = correct and found["peers"]["ours"]["verified"]["ok"]
    content["clocks_after"] = device.clocks(place)
    common.write(path, content)
    judge.show(judge.rows(targets_gpu.TARGETS, {"logits": content}))
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
