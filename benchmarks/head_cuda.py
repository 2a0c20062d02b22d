"""The head benchmark on a GPU: `python -m benchmarks.head --device cuda`.

8192 completion tokens and as many prompt tokens, the heads of four models, every peer in the same
process. Verified against float64 on all rows before timing; then CUDA events, cold L2, interleaved
rounds. Written after every case, in the order of value, so that a run that is cut short leaves
what it has. `--rehearse` runs the same code on a CPU with tiny sizes; that measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import time
from typing import Any

import torch

from benchmarks import common, device, head_cuda_peers, head_scalar_peers, judge, targets_gpu
from benchmarks.head_cuda_peers import PEERS, SHAPES, Shape
from benchmarks.head_problem import Problem, exact, verify

GEMMS = {"nograd": 1, "frozen": 2, "trained": 3}
# In the order of value: first what the targets name.
CASES = [
    ("llama-3-8b", "bf16", "frozen"),
    ("llama-3-8b", "bf16", "trained"),
    ("qwen2.5-0.5b", "bf16", "trained"),
    ("qwen2.5-0.5b", "bf16", "frozen"),
    ("llama-3-8b", "bf16", "nograd"),
    ("gemma-2-2b", "bf16", "frozen"),
    ("qwen2.5-7b", "bf16", "trained"),
    ("qwen2.5-0.5b", "amp", "trained"),
    ("qwen2.5-7b", "bf16", "frozen"),
    ("gemma-2-2b", "bf16", "trained"),
    ("llama-3-8b", "amp", "trained"),
]
QUICK_CASES = CASES[:3]


def name_of(case: tuple[str, str, str]) -> str:
    return "/".join(case)


def prepare(peer: str, p: Problem, truth: Any, place: torch.device) -> dict[str, Any]:
    """Runs and verifies one peer, measures its memory; {"not_run": reason} where it cannot run."""
    try:
        run = PEERS[peer](p)
        answer = run()
        result: dict[str, Any] = {}
        if peer in head_scalar_peers.PEERS:
            result["verified"] = head_scalar_peers.verify(peer, p, answer, truth)
        elif peer != "floor":
            result["verified"] = verify(p, answer, truth)
        del answer
        if result.get("verified", {"ok": True})["ok"]:
            result["memory"] = device.extra_bytes(common.Call(run), place)
            result["call"] = run
        return result
    except Exception as error:  # a peer that cannot run is a finding, not a failure of ours
        if peer in ("ours", "floor"):
            raise
        return {"not_run": common.why(error)}


def run_case(
    case: tuple[str, str, str], shape: Shape, completion: int, peers: list[str], rounds: int,
    place: torch.device,
) -> dict[str, Any]:  # fmt: skip
    _, dtype, head = case
    p = head_cuda_peers.make_problem(shape, dtype, head, place, completion)
    truth = exact(p)
    results = {}
    for peer in peers:
        results[peer] = prepare(peer, p, truth, place)
    del truth
    gc.collect()
    calls = {n: common.Call(r.pop("call")) for n, r in results.items() if "call" in r}
    before = device.clocks(place)
    for peer, times in device.interleave(calls, rounds, place).items():
        results[peer].update(times)
    floor = results["floor"]["median_s"] if "floor" in results else None
    for result in results.values():
        if floor and "median_s" in result:
            result["times_floor"] = result["median_s"] / floor
    flop = 2 * GEMMS[head] * completion * shape.size * shape.vocabulary
    return {
        "case": name_of(case),
        "size": {"completion": completion, "positions": p.labels.numel(), **shape._asdict()},
        "gemms": GEMMS[head],
        "floor_tflops_per_s": flop / floor / 1e12 if floor else None,
        "weight_elements": shape.vocabulary * shape.size,
        "clocks": {"before": before, "after": device.clocks(place)},
        "peers": results,
    }


def print_case(case: dict[str, Any]) -> None:
    rate = case["floor_tflops_per_s"]
    floor = f"{case['gemms']} bare GEMMs" + (f", {rate:.0f} TFLOP/s" if rate else "")
    print(f"\n{case['case']}: floor = {floor}")
    print(f"{'':10}{'median ms':>11}{'q1':>9}{'q3':>9}{'x floor':>9}{'extra MB':>10}  remarks")
    for peer, result in case["peers"].items():
        if "median_s" not in result:
            print(f"{peer:10}{'-':>11}{'':37}  {common.excuse(result)}")
            continue
        remark = common.errors_of(result)
        quarters = [result.get(f"quartile_{i}_s", result["median_s"]) for i in (1, 3)]
        times = "".join(f"{1e3 * t:9.3f}" for t in quarters)
        ratio = f"{result['times_floor']:9.3f}" if "times_floor" in result else f"{'-':>9}"
        extra = result["memory"]["extra_bytes"] / 1e6
        print(f"{peer:10}{1e3 * result['median_s']:11.3f}{times}{ratio}{extra:10.0f}  {remark}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head --device cuda")
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="on CPU, tiny: measures nothing")
    parser.add_argument("--quick", action="store_true", help="the targets' cases, fewer rounds")
    parser.add_argument("--rounds", type=int, default=None, help="15, or 5 with --quick")
    parser.add_argument("--cases", help="comma-separated, as in llama-3-8b/bf16/frozen")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--seconds", type=float, help="start no further case after so long")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--append", action="store_true", help="only cases that --out lacks")
    options = parser.parse_args(arguments)
    cases = {name_of(case): case for case in CASES}
    chosen = options.cases.split(",") if options.cases else []
    options.peers = options.peers.split(",")
    unknown = [c for c in chosen if c not in cases] + [x for x in options.peers if x not in PEERS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; cases: {', '.join(cases)}")
    options.cases = [cases[c] for c in chosen] or (QUICK_CASES if options.quick else CASES)
    options.rounds = options.rounds or (5 if options.quick else 15)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    place = device.choose(options.rehearse)
    shapes = head_cuda_peers.REHEARSAL if options.rehearse else SHAPES
    completion = (
        head_cuda_peers.REHEARSAL_COMPLETION if options.rehearse else head_cuda_peers.COMPLETION
    )
    started = time.monotonic()
    env = common.environment() | {"gpu": device.facts(place)}
    path = options.out or common.RESULTS / common.device_name(env) / "head.json"
    content: dict[str, Any] = {
        "benchmark": "head",
        "rehearsal": options.rehearse,
        "environment": env,
        "bandwidth": device.bandwidth(place),
        "cases": [],
        "not_reached": [name_of(case) for case in options.cases],
    }
    if options.append and path.exists():
        content["cases"] = json.loads(path.read_text(encoding="utf-8"))["cases"]
        done = {case["case"] for case in content["cases"]}
        options.cases = [case for case in options.cases if name_of(case) not in done]
        content["not_reached"] = [name_of(case) for case in options.cases]
    correct = True
    for case in options.cases:
        if options.seconds is not None and time.monotonic() - started > options.seconds:
            break
        result = run_case(case, shapes[case[0]], completion, options.peers, options.rounds, place)
        content["cases"].append(result)
        content["not_reached"].remove(name_of(case))
        print_case(result)
        common.write(path, content)
        correct = correct and result["peers"].get("ours", {}).get("verified", {"ok": True})["ok"]
    if content["not_reached"]:
        print("\nnot reached:", ", ".join(content["not_reached"]))
    judge.show(judge.rows(targets_gpu.TARGETS, {"head": content}))
    return 0 if correct else 1
