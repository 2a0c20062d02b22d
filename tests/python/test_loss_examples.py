"""The examples that show the functions without a trainer: they run, learn, and stay short."""

from __future__ import annotations

import importlib.util
import pathlib
from types import ModuleType

import fusedpo
import pytest
import torch

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["custom_loss", "hand_written_loop"])
def test_examples_take_less_than_forty_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 40


def test_custom_loss_runs_and_prints_its_gradient(capsys):
    load("custom_loss").main()
    assert "gradient norm" in capsys.readouterr().out


def test_custom_loss_is_dpo_where_lengths_are_equal_and_has_exact_gradients():
    module = load("custom_loss")
    mask = torch.ones(6, 4, dtype=torch.bool)
    logps = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    ref = fusedpo.pair_logps(torch.randn(6, 4, dtype=torch.float64), mask)
    pair = fusedpo.pair_logps(logps, mask)
    want = fusedpo.preference_loss(pair.chosen, pair.rejected, ref.chosen, ref.rejected).loss
    got = module.length_aware_loss(pair, ref)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(x, logps, retain_graph=True)[0] for x in (got, want))
    torch.testing.assert_close(*grads)
    mask[:3, 2:] = False  # shorter chosen completions: another loss, and its own derivative

    def loss(values):
        return module.length_aware_loss(fusedpo.pair_logps(values, mask), ref)

    assert not torch.allclose(loss(logps), want)
    assert torch.autograd.gradcheck(loss, (logps,))


def test_hand_written_loop_learns_the_preference():
    margins = load("hand_written_loop").train(steps=30)
    assert margins[0] == pytest.approx(0.0, abs=1e-6)
    assert margins[-1] > 1.0
