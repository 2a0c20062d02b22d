"""SIGKILL at random moments of a real precompute: nothing synced is lost, no bit differs.

FUSEDPO_KILLS sets how many (200 for a thorough run; CI takes 12).
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("trl", reason="precompute tokenises with TRL")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_lose_nothing_and_end_with_the_same_bits(tmp_path: pathlib.Path) -> None:
    kills = int(os.environ.get("FUSEDPO_KILLS", "12"))
    script = pathlib.Path(__file__).with_name("precompute_kills.py")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(kills), "0"],
        capture_output=True,
        text=True,
        timeout=300 + 20 * kills,
        check=False,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    report = json.loads(result.stdout.splitlines()[-1])
    print(report)
    assert sum(report["where"].values()) == kills
    assert report["resumed"] >= 1
    at_the_disk = kills - report["where"].get("elsewhere", 0)
    assert at_the_disk >= (0.2 * kills if kills >= 100 else 1), report
