"""The peak of memory while something runs: of the CUDA device where there is one, else of the
process."""

from __future__ import annotations

import contextlib
import pathlib
from types import TracebackType

import torch

_STATUS = pathlib.Path("/proc/self/status")


class PeakMemory:
    """Measures from entering to leaving.

    Attributes:
        device: "cuda" (what the allocator handed out) or "process" (resident memory; 0 where there
            is no /proc, as on macOS).
        before, peak: bytes when it began, and at the peak.
    """

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "process"
        self.before = self.peak = 0

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError):  # resets VmHWM, the kernel's own peak
                pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.before = _resident("VmRSS")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        cuda = self.device == "cuda"
        self.peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")


def _resident(name: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
