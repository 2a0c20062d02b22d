"""Where bf16, TRL's default, is slower than fp32, every way to use it by mistake says so."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from fusedpo import _doctor
from fusedpo._bf16 import slow_bf16

WORDS = "torch has no fast bf16 matrix products for this processor"


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN has bf16 products, on a machine without accelerator."""
    found: bool = request.param
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: found)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return found


def test_cpu_is_slow_where_onednn_has_no_bf16_products(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in (None, "cpu", torch.device("cpu")):
        reason = slow_bf16(device)
        assert (reason is None) if fast else (reason is not None and reason.startswith(WORDS))
    assert slow_bf16("cuda") is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert slow_bf16() is None


def test_torch_without_onednn_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert slow_bf16("cpu") is None


def test_doctor_has_the_remedy(fast: bool) -> None:
    remedies = [each for each in _doctor.examine()["remedies"] if each.startswith("bf16: ")]
    assert len(remedies) == (0 if fast else 1)
    assert all("bf16=False" in each for each in remedies)


@pytest.mark.parametrize("autocast", ["auto", "bf16", "fp16", "no"])
def test_precompute_names_the_option_before_it_scores(
    fast: bool, autocast: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer", reason="the command needs the extra cli")
    from fusedpo import cli

    def scored(*_: Any, **__: Any) -> Any:
        raise ValueError("scoring")

    monkeypatch.setattr("fusedpo.precompute", scored)
    words = ["--model", "m", "--data", "d", "--output", "o", "--autocast", autocast]
    assert cli.main(["precompute", *words]) == 1
    *notes, end = capsys.readouterr().err.splitlines()
    assert end == "fusedpo precompute: scoring"
    assert len(notes) == (1 if autocast in ("auto", "bf16") and not fast else 0)
    assert all(note.startswith(f"note: {WORDS}") for note in notes)
    assert all(note.endswith("--autocast no") for note in notes)


@pytest.mark.trl
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_trainer_names_the_option_once(
    fast: bool, bf16: bool, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="fusedpo.trl needs TRL")
    from fusedpo.trl import FusedDPOTrainer
    from trl_helpers import make_trainer

    make_trainer(FusedDPOTrainer, tmp_path, bf16=bf16)
    notes = [line for line in capsys.readouterr().out.splitlines() if WORDS in line]
    assert len(notes) == (1 if bf16 and not fast else 0)
    assert all("Pass bf16=False" in note and "DPOConfig" in note for note in notes)
