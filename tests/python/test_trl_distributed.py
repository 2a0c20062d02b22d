"""Two ranks on gloo: gradients, parameters and metrics are those of one process with all data.

All checks share one start of two processes, except what `accelerate launch` and DeepSpeed start.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from fusedpo.trl import FusedDPOTrainer
from trl_curves import CURVES, Curve, curve
from trl_helpers import (
    BEFORE_5,
    assert_equal_logs,
    one_thread,  # noqa: F401  a fixture
)
from trl_two_ranks import SHARDINGS

pytestmark = [
    pytest.mark.trl,
    pytest.mark.skipif(
        not torch.distributed.is_gloo_available(), reason="this torch is built without gloo"
    ),
    pytest.mark.usefixtures("one_thread"),
    # A rank without completions is one of the cases.
    pytest.mark.filterwarnings("ignore:fusedpo. a completion has no token to score"),
]

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = [
    "accelerate.commands.launch",
    *("--multi_gpu", "--num_processes=2", "--num_machines=1"),  # on gloo where there is no GPU
    *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
]
CHECKS = ["ddp_logs", "store", "ddp", "fsdp2"]
# Transformers before 5 cannot load an optimizer's state to "cpu:0", as a CPU is called on a rank;
# its tensor parallelism splits no head, and gives norms the gradients of a rank's own heads only.
if not BEFORE_5:
    CHECKS += ["resume", "tensor_parallel"]


class Ranks:
    """The results of checks on two ranks, each looked at by tests of its own."""

    def __init__(self, launcher: list[str], folder: pathlib.Path, checks: Sequence[str]) -> None:
        self.folder = folder
        script = pathlib.Path(__file__).with_name("trl_two_ranks.py")
        for check in checks:
            (folder / check).mkdir()
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, str(script), str(folder), *checks],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            self.output = process.communicate(timeout=300)[0][-9000:]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and its ranks
            self.output = f"still running after 300 s: {process.communicate()[0][-9000:]}"

    def __getitem__(self, check: str) -> Any:
        path = self.folder / f"{check}.json"
        assert path.exists(), f"{check} did not come to its end; {self.output}"
        return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> Ranks:
    return Ranks(TORCHRUN, tmp_path_factory.mktemp("ranks"), CHECKS)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: Any) -> Ranks:
    return Ranks(ACCELERATE, tmp_path_factory.mktemp("launched"), ("ddp",))


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: Any) -> Ranks:
    pytest.importorskip("deepspeed", reason="ZeRO needs DeepSpeed")
    return Ranks(TORCHRUN, tmp_path_factory.mktemp("deepspeed"), ("zero2", "zero3"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: Any) -> dict[str, Curve]:
    folder = tmp_path_factory.mktemp("one")
    return {name: curve(FusedDPOTrainer, folder, name, pairs_per_rank=4) for name in CURVES}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize(
    ("launcher", "engine"),
    [("ranks", "ddp"), ("launched", "ddp"), ("deepspeed", "zero2"), ("deepspeed", "zero3")],
)
def test_two_ranks_train_as_one_process(
    launcher: str, engine: str, name: str, one_process: dict[str, Curve], request: Any
) -> None:
    results = request.getfixturevalue(launcher)
    assert name in results[engine]
    got = torch.load(results.folder / engine / f"{name}.pt", weights_only=False)
    got.assert_equal(one_process[name], name)
    assert_equal_logs(got.logs, one_process[name].logs, rel=1e-5, rewards=1e-5)


def test_ddp_logs_equal_trl(ranks: Ranks) -> None:
    logs = ranks["ddp_logs"]
    assert any("eval_rewards/margins" in entry for entry in logs["DPOTrainer"])
    assert_equal_logs(logs["FusedDPOTrainer"], logs["DPOTrainer"])


def test_ddp_with_a_store_equals_ddp_with_a_reference(ranks: Ranks) -> None:
    logs = ranks["store"]
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


@pytest.mark.skipif(BEFORE_5, reason="transformers before 5 resumes no CPU training on ranks")
def test_resumed_training_goes_on_as_if_it_had_not_stopped(ranks: Ranks) -> None:
    logs = ranks["resume"]
    assert len(logs["straight"]) == 5  # four steps and a summary
    for entry in logs["straight"] + logs["resumed"]:
        entry.pop("num_tokens", None)  # TRL counts from the resumption
    assert_equal_logs(logs["resumed"], logs["straight"], rel=1e-5)


def test_fsdp2_trains_as_one_process_however_the_head_is_sharded(ranks: Ranks) -> None:
    assert sorted(ranks["fsdp2"]) == sorted(SHARDINGS)


@pytest.mark.skipif(BEFORE_5, reason="transformers before 5 splits no head")
def test_head_that_is_split_over_ranks_gives_the_whole_gradients(ranks: Ranks) -> None:
    assert ranks["tensor_parallel"] == ["qwen3", "qwen3 tied"]
