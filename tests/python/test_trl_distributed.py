"""Two ranks on gloo: metrics gathered as TRL gathers them, and gradients averaged."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from trl_helpers import assert_equal_logs

pytestmark = [
    pytest.mark.trl,
    pytest.mark.skipif(
        not torch.distributed.is_gloo_available(), reason="this torch is built without gloo"
    ),
]


def run_on_two_ranks(what: str, folder: pathlib.Path) -> dict[str, Any]:
    script = pathlib.Path(__file__).with_name("trl_two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(script), what, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    logs: dict[str, Any] = json.loads((folder / "logs.json").read_text(encoding="utf-8"))
    return logs


def test_ddp_logs_equal_trl_and_ranks_stay_equal(tmp_path: pathlib.Path) -> None:
    logs = run_on_two_ranks("ddp", tmp_path)
    assert any("eval_rewards/margins" in entry for entry in logs["DPOTrainer"])
    assert_equal_logs(logs["FusedDPOTrainer"], logs["DPOTrainer"])


def test_ddp_with_a_store_equals_ddp_with_a_reference(tmp_path: pathlib.Path) -> None:
    logs = run_on_two_ranks("store", tmp_path)
    assert any("eval_rewards/margins" in entry for entry in logs["online"])
    for run in ("first", "second"):
        for mine, theirs in zip(logs[run], logs["online"], strict=True):
            if abs(theirs.get("rewards/margins", 1.0)) < 1e-5:  # the sign of rounding errors
                mine["rewards/accuracies"] = theirs["rewards/accuracies"]
        assert_equal_logs(logs[run], logs["online"])
    # Both ranks scored a share, before the first step; the second training scored nothing.
    assert len(logs["records in logs"]) >= 2
    assert min(logs["records in logs"]) > 0
    assert logs["records"] <= sum(logs["records in logs"]) <= logs["records"] + 4


def test_fsdp2_head_of_its_own_gets_the_gradient_averaged_over_ranks(
    tmp_path: pathlib.Path,
) -> None:
    run_on_two_ranks("fsdp2", tmp_path)
