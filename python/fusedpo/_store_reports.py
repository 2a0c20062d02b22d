"""What the reference store tells: plain values, nothing of the compiled code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """Something that verify found; offset is in bytes, None where it concerns the whole file."""

    file: str
    offset: int | None
    what: str


class FileInfo(NamedTuple):
    """One file of a store."""

    name: str
    kind: str  # "log" or "snapshot"
    bytes: int
    records: int
    closed: bool  # False: a log whose writer is at work, or died


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found. `problems` lists the first ones, `problem_count` counts all."""

    ok: bool
    records: int  # distinct keys that are intact
    problems: list[Problem] = field(default_factory=list)
    problem_count: int = 0
    notes: list[Problem] = field(default_factory=list)  # harmless: bytes that were never promised
    files: list[FileInfo] = field(default_factory=list)


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did. `kept_logs` were not closed by their writers: merged, but not removed."""

    snapshot: str | None
    records: int
    removed: list[str] = field(default_factory=list)
    kept_logs: list[str] = field(default_factory=list)
    discarded: list[str] = field(default_factory=list)  # bytes never confirmed by a sync


def verify_report(found: dict[str, Any]) -> VerifyReport:
    """From what the compiled code returns."""
    return VerifyReport(
        ok=found["problem_count"] == 0,
        records=found["records"],
        problems=[Problem(*p) for p in found["problems"]],
        problem_count=found["problem_count"],
        notes=[Problem(*p) for p in found["notes"]],
        files=[FileInfo(*f) for f in found["files"]],
    )
