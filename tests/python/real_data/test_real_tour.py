"""The tour of the whole loop, with the model and the stories that docs/tour.md shows."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("trl", reason="the tools need the extras")

pytestmark = pytest.mark.real_data

SCRIPT = pathlib.Path(__file__).parents[3] / "examples" / "tour.sh"


def test_tour_makes_a_policy_that_its_judge_prefers(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    scripts = pathlib.Path(sys.executable).parent
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "tour")],
        env=os.environ | offline | path | {"FUSEDPO_REAL_DATA": str(real_data)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rates = re.findall(r"against before\.jsonl.*?win rate ([\d.]+)", result.stdout, re.DOTALL)
    print(f"win rates against the first model: trained {rates[0]} %, iterated {rates[1]} %")
    assert float(rates[0]) > 60
    assert float(rates[1]) > 80
