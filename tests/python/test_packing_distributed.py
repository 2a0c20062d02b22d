"""Packed rows on two gloo ranks, each with a layout of its own."""

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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    script = pathlib.Path(__file__).with_name("packing_two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    loaded: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return loaded


def test_fsdp2_gives_the_mean_of_both_ranks_gradients(results: dict[str, Any]) -> None:
    assert set(results["fsdp2"]) == {"plain", "checkpointing"}
    for difference in results["fsdp2"].values():
        assert difference < 1e-5


def test_stream_that_one_rank_reads_for_both_is_packed_by_each(results: dict[str, Any]) -> None:
    assert any("eval_loss" in entry for entry in results["packed"])
    assert_equal_logs(results["packed"], results["padded"])
    assert results["tokens"]["packed"] < 0.5 * results["tokens"]["padded"]


def test_stream_that_evaluate_and_predict_are_given_later_is_packed_by_each(
    results: dict[str, Any],
) -> None:
    assert any("eval_loss" in entry for entry in results["late packed"])
    assert any("predicted_loss" in entry for entry in results["late packed"])
    assert_equal_logs(results["late packed"], results["late padded"])
    assert results["tokens"]["late packed"] < 0.5 * results["tokens"]["late padded"]
