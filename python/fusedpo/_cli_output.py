"""How the `fusedpo` command shows what it did."""

from __future__ import annotations

import os
import sys
from typing import Any

from fusedpo._precompute.filling import PrecomputeReport, Progress


def is_main_process() -> bool:
    """Of several processes under torchrun or accelerate launch one speaks."""
    return os.environ.get("RANK", "0") == "0"


def describe(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, (ValueError, ImportError)) else f"{text}"


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
    if report.without_tokens:
        lines.append(f"{report.without_tokens} completions have no token left to score")
    if report.sample is not None:
        lines.append(
            f"{report.sample.records} records scored again: largest difference "
            f"{report.sample.largest_difference:.2g} nats, relative "
            f"{report.sample.largest_relative_difference:.2g}"
        )
    return "\n".join(lines)
