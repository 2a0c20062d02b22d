"""What runs on a GPU machine, rehearsed without one: benchmarks, sanitizer verdicts, the test group.

Nothing here proves anything about CUDA; it keeps the scripts from rotting between two GPUs.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "gpu_run.sh").exists(), reason="needs the project's own folder"
)

# ---- scripts/compute_sanitizer.sh ---------------------------------------------------------------

CLEAN = "========= ERROR SUMMARY: 0 errors"
OUT_OF_BOUNDS = """\
========= Invalid __global__ write of size 4 bytes
=========     at void fusedpo::cuda::score_rows<float>(fusedpo::cuda::Rows)+0x70 in rows.cu:10
=========     by thread (3,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error"""
RACE = """\
========= Error: Race reported between Write access at fusedpo::cuda::reduce()+0x50 and Read access
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"""
UNINITIALISED = """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void {kernel}(float*)+0x30
========= ERROR SUMMARY: 2 errors"""
VERDICTS = {
    "clean": ("memcheck", CLEAN, "9 passed in 1.0s", 0),
    "a finding": ("memcheck", OUT_OF_BOUNDS, "9 passed in 1.0s", 1),
    "a race": ("racecheck", RACE, "9 passed in 1.0s", 1),
    "no race": ("racecheck", "========= RACECHECK SUMMARY: 0 hazards displayed", "9 passed", 0),
    "a failed test": ("synccheck", CLEAN, "1 failed, 8 passed in 1.0s", 1),
    "no test at all": ("synccheck", CLEAN, "no tests ran", 1),
    "ours read what nobody wrote": (
        "initcheck",
        UNINITIALISED.format(kernel="fusedpo::cuda::score_rows"),
        "9 passed in 1.0s",
        1,
    ),
    "others read what nobody wrote": (
        "initcheck",
        UNINITIALISED.format(kernel="cutlass::Kernel"),
        "9 passed in 1.0s",
        0,
    ),
    "not allowed in": ("memcheck", "========= Error: Device not supported", "", 2),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_sanitizer_script_judges_by_what_the_tool_wrote(case, tmp_path):
    tool, log, pytest_says, expected = VERDICTS[case]
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(
        "#!/bin/sh\n"
        'while [ $# -gt 0 ]; do [ "$1" = --log-file ] && log=$2; shift; done\n'
        f"cat > \"$log\" <<'EOF'\n{log}\nEOF\necho '{pytest_says}'\n"
    )
    fake.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "compute_sanitizer.sh", "--out", tmp_path / "out", tool],
        env={**os.environ, "COMPUTE_SANITIZER": str(fake)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    assert done.stdout.startswith(f"{tool}: ")


# ---- benchmarks ---------------------------------------------------------------------------------


def run_module(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
