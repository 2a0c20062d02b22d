"""The GPU test group: where it runs, what it borrows from the CPU tests, what it watches.

The group runs wherever a GPU is and is skipped, visibly, elsewhere; FUSEDPO_REQUIRE_CUDA=1 makes a
missing GPU, or missing CUDA operators, a failure. FUSEDPO_TEST_DEVICE=cpu rehearses it on the CPU
operators: that checks the tests themselves and proves nothing about CUDA; over the emulated ones
(cuda_host_ops.py) it checks the CUDA operators but not a GPU. Every helper below has a CPU twin, so
that a rehearsal executes all of them.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import cuda_host_ops
import pytest
import torch
from fusedpo import _load
from torch import Tensor

DEVICE = torch.device(os.environ.get("FUSEDPO_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
EMULATED = not ON_GPU and cuda_host_ops.LIBRARY != ""


def why_not() -> str | None:
    """Why the group cannot run here, or None."""
    if not ON_GPU:
        return None
    if not torch.cuda.is_available():
        return "GPU test group: torch finds no CUDA device (FUSEDPO_TEST_DEVICE=cpu rehearses it)"
    if not _load.native("cuda"):
        return f"GPU test group: no CUDA operators: {_load.why_not('cuda')}"
    return None


def need_device() -> None:
    """Skips the module that calls it where the group cannot run; fails if it was required."""
    reason = why_not()
    if reason is not None and os.environ.get("FUSEDPO_REQUIRE_CUDA") == "1":
        raise RuntimeError(f"FUSEDPO_REQUIRE_CUDA=1, but: {reason}")
    if reason is not None:
        pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def on_device() -> Iterator[torch.device]:
    """Makes DEVICE the default device, so that inputs are made there."""
    torch.set_default_device(DEVICE)
    try:
        yield DEVICE
    finally:
        torch.set_default_device(None)


def borrowed(module: types.ModuleType, but: dict[str, str] | None = None) -> dict[str, Any]:
    """The tests of a module, and its own fixtures, to be collected once more on DEVICE.

    A test is named after its module, since two modules may use one name. `but` names tests that
    hold on CPU only, each with the reason. A name that the module no longer has is an error:
    nothing drops out of the group unnoticed.
    """
    but = but or {}
    tests = {n: f for n, f in vars(module).items() if n.startswith("test_") and callable(f)}
    unknown = but.keys() - tests.keys()
    assert not unknown, f"{module.__name__} has no {', '.join(sorted(unknown))}"
    found = {f"{module.__name__}_{n[5:]}": f for n, f in tests.items() if n not in but}
    fixtures = {
        n: f for n, f in vars(module).items() if type(f).__name__ == "FixtureFunctionDefinition"
    }
    return found | fixtures


# ---- streams and graphs -------------------------------------------------------------------------


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """A stream that is not the default one; what runs in it is complete on exit."""
    if not ON_GPU:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def arrives_late(*tensors: Tensor) -> list[Tensor]:
    """Copies that the current stream fills only after about 50 ms; NaN, or 0, until then."""
    late = [torch.full_like(t, float("nan") if t.is_floating_point() else 0) for t in tensors]
    synchronize()
    if ON_GPU:
        torch.cuda._sleep(100_000_000)
    for to, source in zip(late, tensors, strict=True):
        to.copy_(source, non_blocking=True)
    return late


def _believing_in_capture(call: Callable[[], Any]) -> Any:
    """What emulated operators do under capture; the CPU's do not care."""
    os.environ["FUSEDPO_TEST_CAPTURING"] = "1"
    try:
        return call()
    finally:
        del os.environ["FUSEDPO_TEST_CAPTURING"]


def captured(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Any, ...]]:
    """A CUDA graph of `call` as (replay, outputs): each replay writes the outputs anew."""
    if not ON_GPU:
        outputs = _believing_in_capture(call)

        def rerun() -> None:
            for to, value in zip(outputs, _believing_in_capture(call), strict=True):
                to.detach().copy_(value.detach())

        return rerun, outputs
    with side_stream():  # cuBLAS handles, workspaces, lazily loaded kernels
        for _ in range(3):
            call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


# ---- what a call does, by the profiler ----------------------------------------------------------

# Calls after which the host waits; CPU tensors have only the read of a value.
WAITS = (
    (
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "cudaMemcpy",
        "cuStreamSynchronize",
        "cuCtxSynchronize",
    )
    if ON_GPU
    else ("aten::_local_scalar_dense",)
)
MEASURED = "measured call"


class Profile:
    """What happened while `call` ran, after one call to warm up."""

    def __init__(self, call: Callable[[], Any]) -> None:
        call()
        synchronize()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if ON_GPU:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
            with torch.profiler.record_function(MEASURED):
                call()
            synchronize()
        self.events = list(profile.events())
        spans = [e for e in self.events if e.name == MEASURED and not _on_gpu(e)]
        assert spans, "the profiler did not record the call"
        self.start, self.end = spans[0].time_range.start, spans[0].time_range.end

    def launches(self) -> list[str]:
        """Names of the kernels that ran, or on CPU of the operators of fusedpo."""
        if ON_GPU:
            other = ("Memcpy", "Memset", MEASURED)
            return [e.name for e in self.events if _on_gpu(e) and not e.name.startswith(other)]
        return [e.name for e in self.events if e.name.startswith("fusedpo::")]

    def synchronisations(self) -> list[str]:
        """Calls between start and end of the measured call after which the host waits."""
        return [
            e.name
            for e in self.events
            if e.name in WAITS and self.start <= e.time_range.start <= self.end
        ]

    def products(self) -> int:
        """Multiply-adds of the matrix products that went through torch's dispatcher."""
        total = 0
        for e in self.events:
            if e.name in ("aten::mm", "aten::addmm") and not _on_gpu(e):
                first = 1 if e.name == "aten::addmm" else 0  # addmm's own term comes first
                a, b = e.input_shapes[first : first + 2]
                total += a[0] * a[1] * b[1]
        return total


def _on_gpu(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most memory that torch's allocator handed out during a call over what it held before."""
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        held = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del held
        return peak
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        held = call()
    del held
    results = profile.profiler.kineto_results
    steps = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, step in sorted(steps):
        now += step
        peak = max(peak, now)
    return peak
