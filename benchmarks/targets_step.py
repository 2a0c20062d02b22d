"""The targets of whole training steps on a CPU, one row for every case of dpo_step.json.

Backbone: `shared` against plain TRL, both with the passes of policy and reference, as a share of
the ratio of their tokens. Step: `shared+store` against plain TRL, and against `fused+store`, the
same trainer on padded rows. The measured model has fewer layers than Qwen2.5-0.5B; where the time
of its 24 is known, too (dpo_step.py), both ratios must reach the target. Memory: `shared+store`
against plain TRL, above the weights, which both need.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.judge import Runs, Target

FILES = ("llamafactory-dpo-en", "pandalm-human")
TRAINED = {"lora": "LoRA", "full": "all weights"}
DTYPES = {"fp32": "fp32", "amp": "fp32 under bf16 autocast"}
PAIRS = (4, 8)

Contestants = dict[str, dict[str, Any]]
Judged = tuple[float, dict[str, float]]  # what the target is for, and what is shown with it


class Kind(NamedTuple):
    name: str
    target: str
    unit: str
    limit: float
    at_least: bool
    ratio: Callable[[Contestants], Judged]


def backbone(runs: Contestants) -> Judged:
    faster, fewer = (runs["shared"][name] for name in ("backbone_faster", "fewer_tokens"))
    return faster / fewer, {"times faster": faster, "times fewer tokens": fewer}


def step_against(peer: str) -> Callable[[Contestants], Judged]:
    def ratio(runs: Contestants) -> Judged:
        ours, theirs = runs["shared+store"], runs[peer]
        found = {"as measured": theirs["step"]["median_s"] / ours["step"]["median_s"]}
        if "step_of_24_layers_s" in ours:
            found["with 24 layers"] = theirs["step_of_24_layers_s"] / ours["step_of_24_layers_s"]
        return min(found.values()), found if len(found) > 1 else {}

    return ratio


def memory(runs: Contestants) -> Judged:
    ours, theirs = runs["shared+store"], runs["trl"]
    whole = ours["peak_bytes"] / theirs["peak_bytes"]
    return ours["memory_share"], {"of the whole process": whole}


KINDS = (
    Kind("backbone over token ratio", ">= 0.85", "", 0.85, True, backbone),
    Kind("step against TRL", ">= 3x", "x", 3.0, True, step_against("trl")),
    Kind("step against padded + store", ">= 1.7x", "x", 1.7, True, step_against("fused+store")),
    Kind("peak memory against TRL", "<= 0.6x", "x", 0.6, False, memory),
)


def _target(title: str, kind: Kind, contestants: Contestants) -> Target:
    return Target(
        f"{title}: {kind.name}",
        "",
        kind.target,
        kind.unit,
        kind.limit,
        kind.at_least,
        lambda _: kind.ratio(contestants)[0],
        beside=lambda _: kind.ratio(contestants)[1],
        cell=(title, kind.name),
    )


def _of(title: str, contestants: Contestants) -> list[Target]:
    """The targets of one case; without contestants none of them has a figure."""
    return [_target(title, kind, contestants) for kind in KINDS]


def targets(runs: Runs) -> list[Target]:
    """Those of the cases in the run, and of the default cases that it lacks."""
    found: dict[tuple[Any, ...], list[Target]] = {}
    cases = [case for case in runs.get("dpo_step", {}).get("cases", ()) if case["file"] in FILES]
    depths = {case["case"]["layers"] for case in cases}
    for case in cases:
        what = case["case"]
        key = case["file"], what["pairs"], what["train"], what["dtype"]
        depth = f", {what['layers']} layers" if len(depths) > 1 else ""
        found.setdefault(key, []).extend(_of(_title(*key) + depth, case["runs"]))
    default = list(itertools.product(FILES, PAIRS, TRAINED, DTYPES))
    others = [key for key in found if key not in default]
    return [
        target for key in [*default, *others] for target in found.get(key) or _of(_title(*key), {})
    ]


def _title(file: str, pairs: int, train: str, dtype: str) -> str:
    return f"{file}, {pairs} pairs, {TRAINED[train]}, {DTYPES[dtype]}"
