"""SIGKILL at every stage of pairs and iterate: nothing is done twice, and no byte differs."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("trl", reason="iterate trains with TRL")

import iterate_kills


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    script = pathlib.Path(__file__).with_name("iterate_kills.py")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path_factory.mktemp("kills"))],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_every_kill_fell_where_it_was_to_fall(outcome: dict[str, Any]) -> None:
    assert outcome["killed"] == list(iterate_kills.TARGETS)


def test_the_result_is_that_of_a_run_that_nothing_killed(outcome: dict[str, Any]) -> None:
    files = set(outcome["files"])
    assert {"round-1/pairs.jsonl", "round-2/training/model.safetensors"} < files
    assert {"round-3/samples.jsonl", "round-1/training/checkpoint-3/model.safetensors"} < files
    assert outcome["differing"] == []


@pytest.mark.parametrize(
    "kept", ["keep samples end", "keep verdict end", "write training.json end", "train report end"]
)
def test_what_was_kept_is_not_made_again(outcome: dict[str, Any], kept: str) -> None:
    assert outcome["resumed"][kept] == outcome["whole"][kept] > 0


@pytest.mark.parametrize(
    ("work", "lost"),
    [
        # Each of these kills fell between the work and the moment from which on it is kept.
        ("generate end", {"generate end", "keep samples half"}),
        ("judge end", {"keep verdict half"}),
        ("store end", {"store end"}),
        ("step end", {"checkpoint begin", "optimizer begin", "step end"}),
    ],
)
def test_only_what_a_kill_hit_is_done_again(
    outcome: dict[str, Any], work: str, lost: set[str]
) -> None:
    hit = sum(target in lost for target in outcome["killed"])
    assert outcome["resumed"][work] == outcome["whole"][work] + hit
