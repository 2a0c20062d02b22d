"""What every benchmark shares: the environment it ran in, interleaved timing, and writing JSON."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The CPU features that decide which kernels and which GEMMs run.
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16")
PACKAGES = ("torch", "numpy", "trl", "transformers", "triton", "liger-kernel", "fusedpo")


def _cpu_info() -> dict[str, str]:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first.split("\n"))}


def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 matrices with instructions made for it."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_info().get("flags", "").split())


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _git(*arguments: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def _operators() -> Any:
    with contextlib.suppress(AttributeError, RuntimeError):
        return json.loads(torch.ops.fusedpo.cpu_info())
    return None


def environment() -> dict[str, Any]:
    """Machine, versions and commit; no host or user name."""
    cpu = _cpu_info()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_family_model": [cpu.get("cpu family"), cpu.get("model")],
        "flags": [flag for flag in FLAGS if flag in flags],
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "settings": {
            k: v
            for k, v in sorted(os.environ.items())
            if k.startswith("FUSEDPO_") and k != "FUSEDPO_REAL_DATA"
        },
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fusedpo_operators": _operators(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
    }


def device_name(env: dict[str, Any]) -> str:
    """A folder name for this machine's results: the GPU that was timed, else CPU, number of cores,
    widest vector extension."""
    if env.get("gpu"):
        return re.sub(r"[^a-z0-9]+", "-", env["gpu"]["name"].lower()).strip("-")
    widest = next(
        (f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in env["flags"]), ""
    )
    text = f"{env['cpu']} {env['cpus']} cores {widest}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@contextlib.contextmanager
def threads(count: int) -> Iterator[int]:
    """Gives the number of threads torch has inside: `count`, or as many as before if it is 0."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


class Call(NamedTuple):
    """What is timed, and what has to be put right before it, untimed."""

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None


def seconds_of(call: Call) -> float:
    if call.before is not None:
        call.before()
    start = time.perf_counter()
    call.run()
    return time.perf_counter() - start


def interleave(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, once per round, so that drift hits all alike. The caller has run each
    once before."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds_of(call))
    return times


def why(error: BaseException) -> str:
    """One line about an error, for the record of a peer that cannot run here."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def summary(values: list[float]) -> dict[str, Any]:
    return {
        "median_s": statistics.median(values),
        "min_s": min(values),
        "max_s": max(values),
        "rounds": len(values),
    }


def write(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def commits_of(
    content: Mapping[str, Any], name: Callable[[Mapping[str, Any]], str]
) -> dict[str, list[str | None]]:
    """The commits that cases were measured at, by their names. A case without one of its own was
    measured at the environment's; so was what has no cases, whose name is empty."""
    found: dict[str, list[str | None]] = {}
    for case in content.get("cases", ()):
        commit = case.get("commit", content["environment"]["commit"])
        commits = found.setdefault(name(case), [])
        if commit not in commits:
            commits.append(commit)
    return found or {"": [content["environment"]["commit"]]}


def excuse(result: Mapping[str, Any]) -> str:
    """Why a result has no time."""
    if "not_run" in result:
        return f"not run: {result['not_run']}"
    return f"WRONG, not timed: {errors_of(result)}"


def errors_of(result: Mapping[str, Any]) -> str:
    errors = result.get("verified", {}).get("errors", {})
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


_MADV_PAGEOUT = 21  # Linux


def drop_free_pages() -> None:
    """Has the kernel take the pages that this process keeps but has marked as free (MADV_FREE).

    It does so by itself when it is short of memory. Until then they count as resident, though
    nobody's, and whoever measures memory must neither count them nor find them waiting.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    begin = end = 0
    for line in pathlib.Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if match := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(number, 16) for number in match.groups())
        elif line.startswith("LazyFree:") and int(line.split()[1]) > 0:
            size = ctypes.c_size_t(end - begin)
            if libc.madvise(ctypes.c_void_p(begin), size, _MADV_PAGEOUT) != 0:
                raise OSError(ctypes.get_errno(), "madvise(MADV_PAGEOUT): needs Linux 5.4")


class PeakMemory:
    """Bytes by which the resident memory of this process rose above its value at the start."""

    def __enter__(self) -> PeakMemory:
        drop_free_pages()
        # 5 resets the high-water mark to what is resident now (Linux).
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before = self._status("VmRSS")
        self.extra_bytes = 0
        return self

    def __exit__(self, *_: object) -> None:
        self.extra_bytes = self._status("VmHWM") - self.before

    @staticmethod
    def _status(field: str) -> int:
        for line in pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {field}")
