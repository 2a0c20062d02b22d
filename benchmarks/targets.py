"""python -m benchmarks.targets FOLDER: the targets of the GPU benchmarks, row by row.

Reads head.json, logits.json and losses.json of one run, prints and writes targets.json: for every
row its floor, its target, what was measured and whether it was met; "not measured" where there is
no figure. Targets are for an H200, bf16, 8192 completion tokens; floors are bare GEMMs or bytes at
4.3 TB/s.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import common

MS, GB = 1e3, 1e9
BUDGET = 2.5 * 2**30  # logits kept for the weight's gradient by default
Runs = dict[str, dict[str, Any]]  # "head", "logits", "losses" -> content of the JSON


class Target(NamedTuple):
    case: str
    floor: str
    target: str
    unit: str
    limit: float
    at_least: bool  # the limit is a lower bound
    measure: Callable[[Runs], float]  # raises KeyError or StopIteration where there is no figure
    floor_here: Callable[[Runs], float] | None = None  # the floor as measured in the same run, ms


def _peers(runs: Runs, case: str) -> dict[str, Any]:
    peers: dict[str, Any] = next(c for c in runs["head"]["cases"] if c["case"] == case)["peers"]
    return peers


def _head_ms(case: str, peer: str = "ours") -> Callable[[Runs], float]:
    return lambda runs: MS * _peers(runs, case)[peer]["median_s"]


def _head_faster(case: str, peer: str) -> Callable[[Runs], float]:
    def ratio(runs: Runs) -> float:
        peers = _peers(runs, case)
        return peers[peer]["median_s"] / peers["ours"]["median_s"]

    return ratio


def _head_extra(case: str, trained: bool) -> Callable[[Runs], float]:
    def extra(runs: Runs) -> float:
        found = next(c for c in runs["head"]["cases"] if c["case"] == case)
        memory = found["peers"]["ours"]["memory"]
        allowed = BUDGET + 4 * found["weight_elements"] if trained else 0
        return (memory["extra_bytes"] - memory["of_which_gradients"] - allowed) / GB

    return extra


def _logits_ms(name: str) -> Callable[[Runs], float]:
    return lambda runs: MS * runs["logits"]["passes"][name]["peers"]["ours"]["median_s"]


def _logits_floor_ms(name: str) -> Callable[[Runs], float]:
    return lambda runs: MS * runs["logits"]["passes"][name]["floor_s"]["at_measured_bandwidth"]


def _losses(field: str, pick: Callable[[list[float]], float]) -> Callable[[Runs], float]:
    return lambda runs: pick([row[field] for row in runs["losses"]["lists"].values()])


LLAMA, QWEN = "llama-3-8b/bf16", "qwen2.5-0.5b/bf16"
TARGETS = [
    Target("logits 8192 x 151936, forward with all five outputs", "0.58 ms", "<= 0.70 ms",
           "ms", 0.70, False, _logits_ms("forward, all outputs"),
           _logits_floor_ms("forward, all outputs")),
    Target("the same, forward + backward in place", "1.74 ms", "<= 1.9 ms",
           "ms", 1.9, False, _logits_ms("forward + backward in place"),
           _logits_floor_ms("forward + backward in place")),
    Target("from hidden, head frozen, 4096 x 128256, fwd+bwd", "21.8 ms", "<= 24 ms",
           "ms", 24.0, False, _head_ms(f"{LLAMA}/frozen"), _head_ms(f"{LLAMA}/frozen", "floor")),
    Target("the same against TRL", "", ">= 1.35 x faster",
           "x", 1.35, True, _head_faster(f"{LLAMA}/frozen", "trl")),
    Target("from hidden, head trained, 4096 x 128256, fwd+bwd", "32.7 ms", "<= 36 ms",
           "ms", 36.0, False, _head_ms(f"{LLAMA}/trained"), _head_ms(f"{LLAMA}/trained", "floor")),
    Target("the same against TRL", "", ">= 1.2 x faster",
           "x", 1.2, True, _head_faster(f"{LLAMA}/trained", "trl")),
    Target("from hidden, head trained, 896 x 151936, fwd+bwd", "8.5 ms", "<= 10.5 ms",
           "ms", 10.5, False, _head_ms(f"{QWEN}/trained"), _head_ms(f"{QWEN}/trained", "floor")),
    Target("loss family, lists of 3, B = 64, fwd+bwd: launches", "", "<= 2 launches",
           "launches", 2, False, _losses("launches", max)),
    Target("the same against eager", "", ">= 5 x faster",
           "x", 5.0, True, _losses("times_faster_than_eager", min)),
    Target("extra memory, head frozen, 4096 x 128256, over hidden, weight, gradient", "",
           "<= 1.3 GB", "GB", 1.3, False, _head_extra(f"{LLAMA}/frozen", False)),
    Target("the same, trained, less budget and [V, H] fp32", "",
           "<= 1.3 GB", "GB", 1.3, False, _head_extra(f"{LLAMA}/trained", True)),
]  # fmt: skip


def rows(runs: Runs) -> list[dict[str, Any]]:
    """One dict per target; a rehearsal shows that a figure would be found, and is no verdict."""
    rehearsal = any(run.get("rehearsal") for run in runs.values())
    found = []
    for t in TARGETS:
        row: dict[str, Any] = {"case": t.case, "floor": t.floor, "target": t.target}
        try:
            value = t.measure(runs)
        except (KeyError, StopIteration):
            found.append(row | {"measured": None, "met": None})
            continue
        if rehearsal:
            found.append(row | {"measured": None, "met": None, "rehearsed": value})
            continue
        met = value >= t.limit if t.at_least else value <= t.limit
        row |= {"measured": value, "unit": t.unit, "met": met}
        if t.floor_here is not None:
            row["floor_measured_ms"] = t.floor_here(runs)
        found.append(row)
    return found


def show(found: list[dict[str, Any]]) -> None:
    """Prints the rows that have a figure, and says how many have none."""
    print()
    for row in (r for r in found if r["measured"] is not None):
        verdict = "met   " if row["met"] else "MISSED"
        floor = f" (floor {row['floor']}" if row["floor"] else ""
        if "floor_measured_ms" in row:
            floor += f", {row['floor_measured_ms']:.3f} ms on this card"
        floor += ")" if floor else ""
        print(f"{verdict} {row['case']}: {row['measured']:.3f} {row['unit']}, "
              f"target {row['target']}{floor}")  # fmt: skip
    missing = sum(r["measured"] is None for r in found)
    rehearsed = sum("rehearsed" in r for r in found)
    note = f" ({rehearsed} of them rehearsed)" if rehearsed else ""
    print(f"{missing} of {len(found)} targets not measured here{note}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args(arguments).folder
    runs = {}
    for name in ("head", "logits", "losses"):
        path = folder / f"{name}.json"
        if path.exists():
            runs[name] = json.loads(path.read_text(encoding="utf-8"))
    found = rows(runs)
    show(found)
    environments = {name: run["environment"] for name, run in runs.items()}
    rehearsal = any(run.get("rehearsal") for run in runs.values())
    content = {"rehearsal": rehearsal, "targets": found, "environments": environments}
    common.write(folder / "targets.json", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
