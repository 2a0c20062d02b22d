"""The targets of the GPU benchmarks: an H200, bf16, 8192 completion tokens.

Floors are bare GEMMs, or bytes at 4.3 TB/s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.judge import Runs, Target

MS, GB = 1e3, 1e9
BUDGET = 2.5 * 2**30  # logits kept for the weight's gradient by default


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
