"""python -m benchmarks.head: log-probs from hidden states, against TRL, plain torch and bare GEMMs.

Verifies every contestant against float64, then times them interleaved and reports medians, each
with its ratio to the floor: the bare matrix products on the completion rows. A wrong contestant is
reported as wrong and not timed. One that would take too long (torch multiplies bf16 matrices slowly
on CPUs without bf16 instructions) is verified and timed on a slice of the vocabulary; its time is
scaled up and marked. The extra memory is measured in a process of its own for each contestant.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import subprocess
import sys
from typing import Any

import torch

from benchmarks import common
from benchmarks.head_peers import (
    COMPLETION,
    DTYPES,
    FLOORS,
    HEADS,
    PEERS,
    POSITIONS,
    SIZE,
    VOCABULARY,
    exact,
    make_problem,
    peers_of,
    verify,
)

PROBE = 64  # the share of the vocabulary on which a contestant's time is predicted
GEMMS = {"nograd": 1, "frozen": 2, "trained": 3}


def predicted_seconds(peer: str, dtype: str, head: str, size: int, vocabulary: int) -> float:
    """Seconds for the whole vocabulary, from calls on `size` entries of it."""
    call = PEERS[peer](make_problem(dtype, head, size))
    call()
    return min(common.seconds_of(call) for _ in range(2)) * vocabulary / size


def affordable(peer: str, dtype: str, head: str, options: argparse.Namespace) -> tuple[int, float]:
    """The vocabulary to time: all of it, or the slice that takes about --max-seconds; and what the
    whole is predicted to take."""
    vocabulary, limit = options.vocabulary, options.max_seconds
    size = vocabulary // PROBE
    predicted = predicted_seconds(peer, dtype, head, size, vocabulary)
    for _ in range(2):  # a small slice predicts too much: it does not amortise what a call costs
        if predicted <= limit:
            return vocabulary, predicted
        size = max(vocabulary // PROBE, int(vocabulary * limit / predicted)) // 64 * 64
        predicted = predicted_seconds(peer, dtype, head, size, vocabulary)
    return (vocabulary if predicted <= limit else size), predicted


def run_case(dtype: str, head: str, options: argparse.Namespace) -> dict[str, Any]:
    vocabulary = options.vocabulary
    results: dict[str, Any] = {}
    slices: dict[str, int] = {}
    for peer in peers_of(dtype):
        slices[peer], predicted = affordable(peer, dtype, head, options)
        results[peer] = {"predicted_s": predicted}
        if slices[peer] != vocabulary:
            results[peer]["extrapolated_from_V"] = slices[peer]

    for size in sorted(set(slices.values())):
        problem = make_problem(dtype, head, size)
        truth = exact(problem)
        calls = {}
        for peer in (p for p in slices if slices[p] == size):
            call = PEERS[peer](problem)
            if peer not in FLOORS:
                results[peer]["verified"] = verify(problem, call(), truth)
            if results[peer].get("verified", {"ok": True})["ok"]:
                calls[peer] = call
        del truth
        gc.collect()
        for peer, times in common.interleave(calls, options.rounds).items():
            scale = vocabulary / size
            results[peer].update(times)
            for field in ("median_s", "min_s", "max_s"):
                results[peer][field] *= scale
        del calls, problem
        gc.collect()

    floor = results["floor"]["median_s"]
    for result in results.values():
        if "median_s" in result:
            result["times_floor"] = result["median_s"] / floor
    if options.memory:
        for peer in ("ours", "trl", "eager"):
            results[peer]["memory"] = memory_of(peer, dtype, head, results[peer], options)
    return {"dtype": dtype, "head": head, "gemms": GEMMS[head], "peers": results}


# ---- memory -------------------------------------------------------------------------------------


def memory_of(
    peer: str, dtype: str, head: str, result: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Peak extra memory of one call, results included, measured in a new process."""
    if not sys.platform.startswith("linux"):
        return {"not_measured": "the high-water mark can be reset on Linux only"}
    if "extrapolated_from_V" in result:
        return {"not_measured": f"one call would take {result['predicted_s']:.0f} s"}
    command = [sys.executable, "-m", "benchmarks.head", "--memory-of", peer]
    command += ["--cases", f"{dtype}-{head}", "--vocabulary", str(options.vocabulary)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT)
    if done.returncode != 0:
        return {"not_measured": done.stderr.strip()[-500:]}
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(peer: str, dtype: str, head: str, vocabulary: int) -> None:
    PEERS[peer](make_problem(dtype, head, 1024))()  # libraries, thread pools
    problem = make_problem(dtype, head, vocabulary)
    call = PEERS[peer](problem)
    gc.collect()
    with common.PeakMemory() as peak:
        answer = call()
    kept = [t for t in (answer.grad_hidden, answer.grad_weight) if t is not None]
    results = sum(t.numel() * t.element_size() for t in kept)
    print(json.dumps({"extra_bytes": peak.extra_bytes, "of_which_gradients": results}))


# ---- targets ------------------------------------------------------------------------------------

# (dtype, head, peer, what must hold): ours <= limit x floor, or peer >= limit x ours.
TO_FLOOR = {(d, h): 1.25 for d in DTYPES for h in ("frozen", "trained")}
FASTER_THAN_TRL = {("fp32", "frozen"): 4.0, ("bf16", "frozen"): 10.0}


def targets(case: dict[str, Any]) -> list[dict[str, Any]]:
    key = (case["dtype"], case["head"])
    peers = case["peers"]
    if "median_s" not in peers["ours"]:
        return [{"case": "-".join(key), "target": "ours is exact", "met": False}]

    def entry(text: str, value: float, met: bool, *involved: str) -> dict[str, Any]:
        estimated = any("extrapolated_from_V" in peers[peer] for peer in involved)
        return {
            "case": "-".join(key),
            "target": text,
            "value": round(value, 3),
            "met": met,
            "extrapolated": estimated,
        }

    ours = peers["ours"]["median_s"]
    found = []
    if key in TO_FLOOR:
        ratio, limit = peers["ours"]["times_floor"], TO_FLOOR[key]
        text = f"ours <= {limit} x its {case['gemms']} bare GEMMs"
        found.append(entry(text, ratio, ratio <= limit, "ours", "floor"))
    if "median_s" in peers["trl"] and key in FASTER_THAN_TRL:
        ratio, limit = peers["trl"]["median_s"] / ours, FASTER_THAN_TRL[key]
        found.append(entry(f"TRL >= {limit:g} x ours", ratio, ratio >= limit, "ours", "trl"))
    if "median_s" in peers["eager"] and case["head"] != "nograd":
        ratio = peers["eager"]["median_s"] / ours
        found.append(entry("eager > 1 x ours", ratio, ratio > 1, "ours", "eager"))
    return found


# ---- what is printed ----------------------------------------------------------------------------


def print_case(case: dict[str, Any]) -> None:
    print(f"\n{case['dtype']}, head {case['head']}: floor = {case['gemms']} bare GEMMs")
    print(f"{'':8}{'median s':>10}{'min':>9}{'max':>9}{'x floor':>9}{'extra MiB':>11}  remarks")
    for peer, result in case["peers"].items():
        remarks = []
        check = result.get("verified")
        if check is not None:
            errors = ", ".join(f"{k} {v:.1e}" for k, v in check["errors"].items())
            remarks.append(errors if check["ok"] else f"WRONG, not timed: {errors}")
        if "extrapolated_from_V" in result:
            remarks.append(f"EXTRAPOLATED from V = {result['extrapolated_from_V']}")
        memory = result.get("memory", {}).get("extra_bytes")
        cells = f"{memory / 2**20:11.0f}" if memory is not None else f"{'-':>11}"
        if "median_s" in result:
            times = "".join(
                f"{result[f]:{w}.3f}" for f, w in (("median_s", 10), ("min_s", 9), ("max_s", 9))
            )
            times += f"{result['times_floor']:9.2f}"
        else:
            times = f"{'-':>10}{'-':>9}{'-':>9}{'-':>9}"
        print(f"{peer:8}{times}{cells}  {'; '.join(remarks)}", flush=True)


def print_targets(found: list[dict[str, Any]]) -> None:
    print("\ntargets")
    for one in found:
        mark = "pass" if one["met"] else "FAIL"
        note = " (extrapolated)" if one.get("extrapolated") else ""
        print(f"  {mark}  {one['case']:14} {one['target']}: {one.get('value', '-')}{note}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    cases = [f"{dtype}-{head}" for dtype in DTYPES for head in HEADS]
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: more options"
    )
    parser.add_argument("--cases", default=",".join(cases), help="of " + ",".join(cases))
    parser.add_argument(
        "--out", type=pathlib.Path, help="JSON; default results/<machine>/head.json"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="torch's default otherwise")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument(
        "--max-seconds", type=float, default=30.0, help="per call; a longer one is extrapolated"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--quick", action="store_true", help="3 rounds, 5 s per call")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--memory-of", choices=list(PEERS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.cases = options.cases.split(",")
    unknown = sorted(set(options.cases) - set(cases))
    if unknown:
        parser.error(f"--cases must be of {', '.join(cases)}; got {', '.join(unknown)}")
    if options.quick:
        options.rounds, options.max_seconds = 3, 5.0
    return options


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
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        dtype, head = options.cases[0].split("-")
        measure_memory(options.memory_of, dtype, head, options.vocabulary)
        return 0
    env = common.environment()
    size = {"positions": POSITIONS, "completion": COMPLETION, "H": SIZE, "V": options.vocabulary}
    flags = " ".join(env["flags"])
    print(f"{env['cpu']}, {env['threads']} threads, {flags}, torch {env['versions']['torch']}")
    print(", ".join(f"{key} {value}" for key, value in size.items()))
    cases: list[dict[str, Any]] = []
    for name in options.cases:
        dtype, head = name.split("-")
        cases.append(run_case(dtype, head, options))
        print_case(cases[-1])
    found = [one for case in cases for one in targets(case)]
    print_targets(found)
    path = options.out or common.RESULTS / common.device_name(env) / "head.json"
    content = {
        "benchmark": "head",
        "environment": env,
        "size": size,
        "cases": cases,
        "targets": found,
    }
    common.write(path, content)
    correct = all(case["peers"]["ours"]["verified"]["ok"] for case in cases)
    missed = options.check and not all(one["met"] for one in found)
    return 0 if correct and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
