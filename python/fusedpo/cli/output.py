"""How the `fusedpo` command shows what it did."""

from __future__ import annotations

import os
import sys
from typing import Any

from fusedpo._precompute.filling import PrecomputeReport, Progress
from fusedpo.store import MergeReport, VerifyReport


def is_main_process() -> bool:
    """Of several processes under torchrun or accelerate launch one speaks."""
    return os.environ.get("RANK", "0") == "0"


class ProgressBar(Progress):
    """Tokens scored, rate and time left, on stderr."""

    def __init__(self) -> None:
        self._bar: Any = None

    def start(self, found: int, records: int, tokens: int) -> None:
        from tqdm import tqdm

        print(
            f"{found} of {records} records are in the store; {tokens} tokens to score",
            file=sys.stderr,
        )
        # A terminal is redrawn often, a log file gets a line now and then.
        interval = 0.2 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=tokens,
            unit=" tokens",
            unit_scale=True,
            mininterval=interval,
            desc="scoring",
            disable=tokens == 0,
        )

    def advance(self, tokens: int) -> None:
        self._bar.update(tokens)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def precompute_text(report: PrecomputeReport) -> str:
    lines = [
        f"{report.store}: {report.records} records of {report.rows} rows; "
        f"{report.found} were there, {report.scored} were scored"
        + (f" by rank 0 of {report.world_size}" if report.world_size > 1 else "")
    ]
    if report.scored:
        rate = report.tokens / max(report.seconds, 1e-9)
        lines.append(f"{report.tokens} tokens in {report.seconds:.1f} s, {rate:.0f} tokens/s")
        lines.append(
            f"{report.computed} tokens computed; padded batches would have {report.padded}"
        )
    if report.not_shared is not None:
        lines.append(f"prompts were not shared: {report.not_shared}")
    if report.without_tokens:
        lines.append(f"{report.without_tokens} completions have no token left to score")
    if report.sample is not None:
        lines.append(
            f"{report.sample.records} records scored again: largest difference "
            f"{report.sample.largest_difference:.2g} nats, relative "
            f"{report.sample.largest_relative_difference:.2g}"
        )
        if report.sample.disagreeing:
            lines.append(f"{report.sample.disagreeing} of them differ by more than rounding allows")
    return "\n".join(lines)


def inspect_text(report: dict[str, Any]) -> str:
    identity = dict(report["identity"])
    info = identity.pop("info", {})
    lines = [
        f"{report['path']}: {report['records']} records, {report['bytes']} bytes in "
        f"{len(report['files'])} files; {report['unmerged_records']} records are in logs"
    ]
    for file in report["files"]:
        state = "" if file["kind"] == "snapshot" or file["closed"] else ", not closed"
        lines.append(f"  {file['kind']:8}  {file['records']:>9} records  {file['name']}{state}")
    lines.append("made with:")
    if "model" in info:
        lines.append(f"  {info['model']}")
    lines += [f"  {name} {value}" for name, value in sorted(info.get("versions", {}).items())]
    lines.append("belongs to this reference:")
    lines += [f"  {name}: {value}" for name, value in _leaves(identity)]
    return "\n".join(lines)


def _leaves(fields: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            found += _leaves(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def verify_text(store: str, report: VerifyReport) -> str:
    lines = [f"{store}: {report.records} records are intact"]
    lines += [_problem(each) for each in report.problems]
    if report.problem_count > len(report.problems):
        lines.append(f"... {report.problem_count} problems in all")
    lines += ["note: " + _problem(each) for each in report.notes]
    lines.append("no problem" if report.ok else f"{report.problem_count} problems")
    return "\n".join(lines)


def _problem(problem: Any) -> str:
    where = "" if problem.offset is None else f" at byte {problem.offset}"
    return f"{problem.file}{where}: {problem.what}"


def merge_text(store: str, report: MergeReport) -> str:
    lines = [f"{store}: {report.records} records in {report.snapshot or 'no snapshot'}"]
    lines += [f"discarded, never confirmed: {each}" for each in report.discarded]
    if report.kept_logs:
        lines.append(
            f"merged, but kept, because their writers have not closed them: "
            f"{', '.join(report.kept_logs)}. If no process writes to them any more, add "
            "--abandoned"
        )
    return "\n".join(lines)
