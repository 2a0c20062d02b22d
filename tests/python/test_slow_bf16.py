"""Where bf16 is slower than fp32, the trainer, `precompute` and the doctor say so."""

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
    name = "_is_mkldnn_bf16_supported"
    monkeypatch.setattr(torch.ops.mkldnn, name, lambda: found, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return found


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_is_mkldnn_bf16_supported"
    monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False, raising=False)


def test_cpu_is_slow_where_onednn_has_no_bf16_products(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in (None, "cpu", torch.device("cpu")):
        reason = slow_bf16(device)
        assert (reason is None) if fast else (reason is not None and reason.startswith(WORDS))
    assert slow_bf16("cuda") is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert slow_bf16() is None


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
def test_torch_with_onednn_says_what_it_has() -> None:
    # Renamed, it would silence every line that is tested here.
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)


def test_torch_without_onednn_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert slow_bf16("cpu") is None


def test_doctor_has_the_remedy(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def remedies() -> list[str]:
        return [each for each in _doctor.examine()["remedies"] if each.startswith("bf16: ")]

    assert len(remedies()) == (0 if fast else 1)
    assert all("bf16=False" in each for each in remedies())
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    monkeypatch.delattr(torch, "accelerator")  # which torch 2.5 has not
    assert remedies() == []


@pytest.mark.parametrize("autocast", ["auto", "bf16", "no"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precompute_names_the_options_on_stderr(
    fast: bool,
    autocast: str,
    dtype: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("trl", reason="precomputing needs TRL")
    import fusedpo
    from precompute_helpers import write_inputs

    inputs = write_inputs(tmp_path, rows=2)
    fusedpo.precompute(inputs.model, inputs.data, tmp_path / "refs", dtype=dtype, autocast=autocast)
    shown = capsys.readouterr()
    notes = [line for line in shown.err.splitlines() if WORDS in line]
    wanted = {"autocast 'no'": autocast != "no", "dtype 'float32'": dtype == "bfloat16"}
    assert len(notes) == (not fast and any(wanted.values()))
    for note in notes:
        assert {words: words in note for words in wanted} == wanted
    assert WORDS not in shown.out  # which is the command's JSON


def lines_of_trainer(capsys: pytest.CaptureFixture[str], *arguments: Any, **options: Any) -> Any:
    pytest.importorskip("trl", reason="fusedpo.trl needs TRL")
    from fusedpo.trl import FusedDPOTrainer
    from trl_helpers import make_trainer

    make_trainer(FusedDPOTrainer, *arguments, **options)
    return [line for line in capsys.readouterr().out.splitlines() if WORDS in line]


@pytest.mark.trl
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_trainer_names_the_option_once(
    fast: bool, bf16: bool, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = lines_of_trainer(capsys, tmp_path, bf16=bf16)
    assert len(notes) == (bf16 and not fast)
    assert all(note.endswith("bf16 is on by default, bf16=False turns it off.") for note in notes)


@pytest.mark.trl
@pytest.mark.usefixtures("slow")
def test_trainer_names_weights_store_and_what_accelerate_was_told(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="fusedpo.trl needs TRL")
    from trl_helpers import make_model

    store = {"ref_store": tmp_path / "refs"}
    model = make_model().to(torch.bfloat16)
    (note,) = lines_of_trainer(capsys, tmp_path, model=model, keywords=store, with_ref_model=False)
    assert "weights are in bf16, dtype='float32'" in note
    assert note.endswith("the store must be made in the same precision (autocast, dtype).")
    assert "bf16=False" not in note
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    (note,) = lines_of_trainer(capsys, tmp_path)
    assert note.endswith("accelerate was told to use mixed_precision bf16, 'no' turns it off.")
