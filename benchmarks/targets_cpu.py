"""The targets of the CPU benchmarks: ratios within one run, on all cores, and memory.

`at_floor` is the ratio that ours would have if it took no longer than the floor of the same run:
the bare matrix products, or the bytes that must move at the bandwidth measured. A target that even
this misses is one that the hardware forbids.
"""

from __future__ import annotations

from typing import Any

from benchmarks.judge import Figure, Runs, Target

BUDGET = 256 * 2**20  # bytes of logits kept for the weight's gradient by default
FORWARD, BACKWARD = "forward-fp32", "backward-fp32"
TITLES = {"fp32": "fp32", "bf16": "bf16", "amp": "fp32 under bf16 autocast"}


def _case(runs: Runs, benchmark: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in runs[benchmark]["cases"] if c.get("name") == name)
    return found


def _seconds(benchmark: str, name: str, *peers: str) -> Figure:
    """Median seconds of a contestant: the fastest of `peers` that has been timed."""

    def figure(runs: Runs) -> float:
        results = _case(runs, benchmark, name)["peers"]
        times = [results[p]["median_s"] for p in peers if "median_s" in results.get(p, {})]
        if not times:
            raise KeyError(peers[0])
        return float(min(times))

    return figure


def _ratio(above: Figure, below: Figure) -> Figure:
    return lambda runs: above(runs) / below(runs)


# ---- logits that exist --------------------------------------------------------------------------


def _logits(name: str, peer: str) -> Figure:
    return _seconds("logits", name, peer)


LOGITS = [
    Target("logits 256 x 151936 fp32, forward, log-probs only: share of the read bandwidth",
           "", ">= 0.80", "", 0.80, True,
           _ratio(_logits(FORWARD, "floor"), _logits(FORWARD, "ours"))),
    Target("the same against log_softmax + gather", "", ">= 5x", "x", 5.0, True,
           _ratio(_logits(FORWARD, "eager"), _logits(FORWARD, "ours")),
           at_floor=_ratio(_logits(FORWARD, "eager"), _logits(FORWARD, "floor"))),
    Target("all five outputs, against log-probs only", "", "<= 1.25x", "x", 1.25, False,
           _ratio(_logits(FORWARD, "ours_all"), _logits(FORWARD, "ours"))),
    Target("all five outputs, against TRL <= 1.14's expressions", "", ">= 20x", "x", 20.0, True,
           _ratio(_logits(FORWARD, "trl"), _logits(FORWARD, "ours_all")),
           at_floor=_ratio(_logits(FORWARD, "trl"), _logits(FORWARD, "floor"))),
    Target("forward + backward in place, against eager", "", ">= 12x", "x", 12.0, True,
           _ratio(_logits(BACKWARD, "eager"), _logits(BACKWARD, "ours_inplace")),
           at_floor=_ratio(_logits(BACKWARD, "eager"), _logits(BACKWARD, "floor_inplace"))),
]  # fmt: skip


# ---- from hidden states -------------------------------------------------------------------------


def _head(name: str, *peers: str) -> Figure:
    return _seconds("head", name, *peers)


def _floor(name: str) -> Figure:
    """The products in the inputs' dtype or in float32, whichever this processor multiplies faster:
    without bf16 instructions torch's bf16 products bound nothing."""
    return _head(name, "floor", "floor_fp32")


def _times_floor(dtype: str, head: str, limit: float) -> Target:
    name = f"{dtype}-{head}"
    products = {"frozen": "two bare GEMMs", "trained": "three bare GEMMs", "nograd": "one GEMM"}
    title = f"from hidden, {TITLES[dtype]}, {head}: against {products[head]}"
    return Target(title, "", f"<= {limit}x", "x", limit, False,
                  _ratio(_head(name, "ours"), _floor(name)))  # fmt: skip


def _faster(dtype: str, head: str, peer: str, limit: float, size: str = "") -> Target:
    name = f"{dtype}-{head}{size}"
    title = f"from hidden, {TITLES[dtype]}, {head}{size.replace('-', ', ')}: against {peer}"
    return Target(title, "", f">= {limit}x", "x", limit, True,
                  _ratio(_head(name, peer), _head(name, "ours")),
                  at_floor=_ratio(_head(name, peer), _floor(name)))  # fmt: skip


def _autocast(head: str) -> Target:
    name = f"amp-{head}"

    def measure(runs: Runs) -> float:
        cast = _head(name, "cast_weight")(runs)
        return (_head(name, "ours")(runs) - cast) / _floor(name)(runs)

    title = f"from hidden, {TITLES['amp']}, {head}: less one cast of W, against its GEMMs"
    return Target(title, "", "<= 1.2x", "x", 1.2, False, measure)


HIDDEN = [
    *(_times_floor(dtype, "frozen", 1.15) for dtype in ("fp32", "bf16")),
    _faster("fp32", "frozen", "trl", 6.0),
    _faster("bf16", "frozen", "trl", 15.0),
    _faster("fp32", "frozen", "eager", 1.1),
    _faster("bf16", "frozen", "eager", 2.2),
    *(_times_floor(dtype, "trained", 1.20) for dtype in ("fp32", "bf16")),
    _faster("fp32", "trained", "trl", 4.5),
    _faster("bf16", "trained", "trl", 12.0),
    *(_times_floor(dtype, "nograd", 1.10) for dtype in ("fp32", "bf16")),
    *(_autocast(head) for head in ("frozen", "trained")),
    *(_faster("amp", head, "trl", 10.0) for head in ("frozen", "trained")),
    *(_faster("fp32", head, "eager", 2.0, "-V32000-H64") for head in ("frozen", "trained")),
]


# ---- memory -------------------------------------------------------------------------------------


def _memory(dtype: str, head: str) -> Target:
    def measure(runs: Runs) -> float:
        case = _case(runs, "memory", f"{dtype}-{head}-N4096-share100")
        allowed = 4 * case["N"] * case["H"]
        if head == "trained":
            allowed += BUDGET + 4 * case["V"] * case["H"]
        return float(case["peers"]["ours"]["extra_bytes"] - allowed) / 1e6

    less = "[N, H]" if head == "frozen" else "[N, H], the logits' budget and [V, H] fp32"
    title = f"peak extra memory at 4096 rows, {TITLES[dtype]}, {head}, less {less}"
    return Target(title, "", "<= 300 MB", "MB", 300.0, False, measure)


MEMORY = [_memory(dtype, head) for dtype in TITLES for head in ("frozen", "trained")]
TARGETS = [*LOGITS, *HIDDEN, *MEMORY]
