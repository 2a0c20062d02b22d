"""Timing and memory on a GPU: events, cold L2, interleaved rounds; facts of the card; its floors.

Every function takes the device and has a CPU twin, so that a rehearsal without a GPU runs it all.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Call

NOMINAL_BANDWIDTH = 4.3e12  # bytes/s of an H200, what docs and targets divide bytes by
FLUSH_BYTES = (
    1 << 30
)  # written before each timed call: many times any L2, and 0.25 ms of head start
_SMI = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit,temperature.gpu"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def facts(device: torch.device) -> dict[str, Any] | None:
    """The card, its driver and its clocks at this moment; None on CPU."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_properties(device)
    found = {
        "name": card.name,
        "memory_bytes": card.total_memory,
        "multiprocessors": card.multi_processor_count,
        "l2_bytes": card.L2_cache_size,
        "capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
    }
    return found | clocks(device)


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature as nvidia-smi tells them; {} where it cannot."""
    if device.type != "cuda":
        return {}
    command = ["nvidia-smi", f"--query-gpu={_SMI},driver_version", "--format=csv,noheader"]
    command.append(f"--id={device.index or 0}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    names = [*_SMI.split(","), "driver"]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


# ---- time ---------------------------------------------------------------------------------------


def interleave(
    calls: dict[str, Call], rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Times every call once per round after two untimed ones, each time with a cold L2 cache."""
    flush = _flusher(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(2):
            _seconds(call, flush, device)
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_seconds(call, flush, device))
    return {name: summary(values) for name, values in times.items()}


def _flusher(device: torch.device) -> Callable[[], Any] | None:
    if device.type != "cuda":
        return None
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_


def _seconds(call: Call, flush: Callable[[], Any] | None, device: torch.device) -> float:
    if flush is None:
        return common.seconds_of(call)
    if call.before is not None:
        call.before()
    synchronize(device)
    flush()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call.run()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1e3


def summary(values: list[float]) -> dict[str, Any]:
    found = common.summary(values)
    if len(values) > 1:
        quarters = statistics.quantiles(values, n=4)
        found |= {"quartile_1_s": quarters[0], "quartile_3_s": quarters[2]}
    return found


# ---- memory -------------------------------------------------------------------------------------


def extra_bytes(call: Call, device: torch.device) -> dict[str, int]:
    """Peak memory of one call over what was held before, and how much of it the result is."""
    if call.before is not None:
        call.before()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call.run()
        torch.cuda.synchronize(device)
        extra = torch.cuda.max_memory_allocated(device) - before
    else:
        with common.PeakMemory() as peak:
            result = call.run()
        extra = peak.extra_bytes
    gradients = sum(
        t.numel() * t.element_size()
        for t in (getattr(result, "grad_hidden", None), getattr(result, "grad_weight", None))
        if t is not None
    )
    return {"extra_bytes": extra, "of_which_gradients": gradients}


# ---- floors and launches ------------------------------------------------------------------------


def bandwidth(device: torch.device, rounds: int = 10, size: int | None = None) -> dict[str, float]:
    """Bytes per second of a read (a sum) and of a copy, as torch's own kernels reach them."""
    count = size or ((1 << 29) if device.type == "cuda" else (1 << 22))
    x = torch.randn(count, device=device)
    y = torch.empty_like(x)
    times = interleave({"read": Call(x.sum), "copy": Call(lambda: y.copy_(x))}, rounds, device)
    return {
        "read_bytes_per_s": 4 * count / times["read"]["median_s"],
        "copy_bytes_per_s": 8 * count / times["copy"]["median_s"],
    }


def launches(run: Callable[[], Any], device: torch.device) -> list[str]:
    """Names of the kernels of one call; on CPU of the operators of fusedpo."""
    run()
    synchronize(device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        synchronize(device)
    if device.type == "cuda":
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return [e.name for e in events if not e.name.startswith(("Memcpy", "Memset"))]
    return [e.name for e in profile.events() if e.name.startswith("fusedpo::")]


def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def choose(rehearse: bool) -> torch.device:
    """The GPU, or the CPU for a rehearsal; ends the program where there is no GPU."""
    if rehearse:
        print("REHEARSAL on a CPU with tiny sizes: it checks this program and measures nothing.")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --rehearse runs the same code on a CPU with tiny sizes")
    return torch.device("cuda")
