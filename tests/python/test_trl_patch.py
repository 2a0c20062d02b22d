"""patch_trl: what it replaces, which TRL it accepts, and that TRL is restored exactly."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from fusedpo.trl.versions import PATCH, at_least

if not at_least(1, 15):
    pytest.skip(f"patch_trl needs TRL {PATCH.text}", allow_module_level=True)

import trl.trainer.utils as trl_utils
from fusedpo.reference import METRICS
from fusedpo.trl import UnsupportedTRLError, patch_trl, status, unpatch_trl
from trl import DPOTrainer
from trl_helpers import (
    one_thread,  # noqa: F401  a fixture
    record_scored_rows,
    train,
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

TRL_FUNCTION = trl_utils._ChunkedLogProbFunction
TRL_USE_TRITON = vars(trl_utils).get("_use_triton")  # since TRL 1.16


@pytest.fixture(autouse=True)
def _trl_is_restored() -> Any:
    yield
    unpatch_trl()
    assert trl_utils._ChunkedLogProbFunction is TRL_FUNCTION
    assert vars(trl_utils).get("_use_triton") is TRL_USE_TRITON


def test_positions_without_a_label_do_not_reach_the_patched_head(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored_rows = record_scored_rows(monkeypatch)
    with patch_trl():
        trainer = train(DPOTrainer, tmp_path, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    scored_rows.clear()
    with patch_trl():
        trainer.compute_ref_log_probs(trainer.ref_model, batch)
    assert scored_rows == [int(batch["completion_mask"].sum())]
    assert scored_rows[0] < batch["input_ids"].numel() / 2


def test_trainer_built_before_the_patch_follows_it(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored_rows = record_scored_rows(monkeypatch)
    trainer = train(DPOTrainer, tmp_path, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    before = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    assert not scored_rows
    with patch_trl():
        patched = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    assert len(scored_rows) == 1
    torch.testing.assert_close(patched, before, rtol=1e-5, atol=1e-5)


ARGUMENTS = ("temperature", "chunk_size", "final_logit_softcapping", "logit_scale", "outputs")


@pytest.mark.parametrize(
    "values",
    [
        (1.0, 32768, None, 1.0, METRICS),
        (0.7, 7, 5.0, 0.5, METRICS),
        (1.0, 32768, None, 1.0, ("log_probs", "entropy")),
        (1.0, 32768),  # TRL's own defaults
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_function_equals_trls_in_values_dtypes_and_gradients(values: Any, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 8, generator=generator)
    weight = torch.randn(33, 8, generator=generator)
    weight[5] = weight[4]  # a tie: is_top1 takes the first maximum
    bias = torch.randn(33, generator=generator) if with_bias else None
    with torch.no_grad():
        logits = hidden @ weight.T + (0 if bias is None else bias)
    targets = logits.argmax(-1)
    targets[::2] = torch.randint(33, (5,), generator=generator)
    hidden[1] = weight[4] * 3
    targets[1] = 5

    def run(function: Any) -> Any:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
        head = leaves if with_bias else [*leaves, None]
        results = function.apply(*head, targets, *values)
        loss = (results[0] * torch.arange(9)).sum()
        if results[1] is not None:
            loss = loss + (results[1] * torch.arange(9).flip(0)).sum()
        return results, torch.autograd.grad(loss, leaves)

    want, want_grads = run(TRL_FUNCTION)
    with patch_trl():
        got, grads = run(trl_utils._ChunkedLogProbFunction)
    assert isinstance(got, tuple)
    for mine, theirs in zip(got, want, strict=True):
        if theirs is None:
            assert mine is None
        else:
            assert mine.dtype == theirs.dtype
            assert mine.requires_grad == theirs.requires_grad
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)
    for mine, theirs in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_function_returns_float32_for_float64_inputs_like_trl() -> None:
    arguments = (torch.randn(3, 4).double(), torch.randn(5, 4).double(), None, torch.arange(3))
    with patch_trl():
        got = trl_utils._ChunkedLogProbFunction.apply(*arguments, 1.0, 32768)
    want = TRL_FUNCTION.apply(*arguments, 1.0, 32768)
    assert [x.dtype for x in got] == [x.dtype for x in want]


def test_block_restores_trl_also_after_an_error() -> None:
    def fails() -> None:
        with patch_trl():
            assert trl_utils._ChunkedLogProbFunction is not TRL_FUNCTION
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert trl_utils._ChunkedLogProbFunction is TRL_FUNCTION
    assert vars(trl_utils).get("_use_triton") is TRL_USE_TRITON


def test_repeated_and_nested_patches_end_with_the_last() -> None:
    with patch_trl():
        first = trl_utils._ChunkedLogProbFunction
        with patch_trl():
            assert trl_utils._ChunkedLogProbFunction is first
        assert status().patched
    assert not status().patched
    patch_trl()
    patch_trl()
    with patch_trl():
        pass
    assert status().patched  # the plain calls last until unpatch_trl
    unpatch_trl()
    assert not status().patched
    unpatch_trl()


def test_unpatch_inside_a_block_wins_and_the_end_of_the_block_changes_nothing() -> None:
    with patch_trl():
        unpatch_trl()
        assert trl_utils._ChunkedLogProbFunction is TRL_FUNCTION
    assert trl_utils._ChunkedLogProbFunction is TRL_FUNCTION


def test_a_handle_is_entered_once() -> None:
    handle = patch_trl()
    with handle, pytest.raises(RuntimeError, match="entered once"), handle:
        pass


def test_blocks_of_several_threads_overlap_without_unpatching_each_other() -> None:
    barrier, seen = threading.Barrier(2), []

    def work(leave_first: bool) -> None:
        with patch_trl():
            barrier.wait()
            if leave_first:
                return
            left.wait()
            seen.append(trl_utils._ChunkedLogProbFunction is not TRL_FUNCTION)

    left = threading.Event()
    threads = [threading.Thread(target=work, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    threads[0].join()
    left.set()
    threads[1].join()
    assert seen == [True]
    assert not status().patched


@pytest.mark.parametrize("version", ["1.9.2", "1.13.0", "1.14.2"])
def test_older_version_is_refused_and_nothing_is_patched(version: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("fusedpo.trl.versions.installed", lambda: version)
    with pytest.raises(
        UnsupportedTRLError,
        match=rf"{version}.*1\.15\.0 to 1\.16\.x\. FusedDPOTrainer works there.*pip install",
    ):
        patch_trl()
    assert trl_utils._ChunkedLogProbFunction is TRL_FUNCTION


def test_newer_version_is_patched_with_a_warning_if_its_function_is_the_known_one(
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr("fusedpo.trl.versions.installed", lambda: "1.93.0")
    monkeypatch.setattr("fusedpo.trl.patch.installed", lambda: "1.93.0")
    with pytest.warns(UserWarning, match=r"TRL 1\.93\.0 is newer than"):
        patch_trl()
    assert trl_utils._ChunkedLogProbFunction is not TRL_FUNCTION
    found = status()
    assert (found.patched, found.supported) == (True, False)
    assert "newer" in str(found.problem)


def test_unknown_signature_is_refused_naming_the_difference(monkeypatch: Any) -> None:
    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, mask: Any) -> Any:
            return hidden

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Changed)
    with pytest.raises(UnsupportedTRLError, match=r"unknown \['mask'\], missing \['temperature'"):
        patch_trl()
    assert trl_utils._ChunkedLogProbFunction is Changed
    assert not status().patched


def test_trl_1_15_without_triton_has_no_function_and_gets_ours(monkeypatch: Any) -> None:
    # There `_ChunkedLogProbFunction` is None on a CPU and `_use_triton` does not exist.
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", None)
    monkeypatch.delattr(trl_utils, "_use_triton", raising=False)
    with patch_trl():
        got = trl_utils._ChunkedLogProbFunction.apply(
            torch.randn(3, 4), torch.randn(5, 4), None, torch.arange(3), 1.0, 32768
        )
        assert not hasattr(trl_utils, "_use_triton")
    assert got[0].shape == (3,)
    assert trl_utils._ChunkedLogProbFunction is None


def test_device_without_operators_keeps_trls_function(monkeypatch: Any) -> None:
    # No such device here: the meta device stands for one.
    called = []

    class Recorder(torch.autograd.Function):
        forward = staticmethod(TRL_FUNCTION.forward)

        @classmethod
        def apply(cls, *args: Any) -> Any:
            called.append(args)
            return args

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Recorder)
    with patch_trl():
        hidden, weight = torch.empty(3, 4, device="meta"), torch.empty(5, 4, device="meta")
        targets = torch.empty(3, dtype=torch.int64, device="meta")
        trl_utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768)
        if at_least(1, 16):
            assert not trl_utils._use_triton(torch.device("meta"))
    assert called[0][4:] == (1.0, 32768, None, 1.0, METRICS)


def test_status_tells_version_support_and_path(monkeypatch: Any) -> None:
    before = status()
    assert not before.patched
    assert before.supported
    assert before.problem is None
    assert before.paths == {"cpu": "TRL's own head", "cuda": "TRL's own head"}
    with patch_trl():
        monkeypatch.setattr("fusedpo._load.native", lambda device: device == "cpu")
        assert status().paths == {"cpu": "fusedpo operators", "cuda": "TRL's own head"}
        monkeypatch.setattr("fusedpo._load.native", lambda device: False)
        assert status().paths["cpu"] == "fusedpo.reference"
        monkeypatch.setattr("fusedpo._load.native", lambda device: True)
        assert status().paths["cuda"] == "fusedpo operators"
        if at_least(1, 16):
            assert trl_utils._use_triton(torch.device("cuda"))  # with Triton or without
    monkeypatch.setattr("fusedpo.trl.patch.installed", lambda: "1.13.0")
    assert not status().supported
    assert "older than what patch_trl supports" in str(status().problem)
