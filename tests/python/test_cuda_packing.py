"""A packed row is as close to float64 on a GPU as padded rows are; and it is one call there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the fused head needs TRL")

import test_packing_attention
import transformers
from cuda_cases import DEVICE, need_device, on_device  # noqa: F401  a fixture
from fusedpo._head import add_fused_head
from fusedpo._packing import varlen
from fusedpo._packing.attention import use_packed_attention
from fusedpo._packing.layout import pack
from packing_helpers import VOCABULARY, make_groups, padded
from torch import Tensor

need_device()

# Longer than the tiles of a kernel, and than the window; and short ones.
LENGTHS = ((150, (70, 130)), (40, (3, 90)), (0, (20, 8)), (12, (1,)), (5, (30, 3, 8)))


def make_qwen2(dtype: torch.dtype) -> Any:
    """Grouped-query heads, rotary embeddings; one layer with a window and one without."""
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(DEVICE, dtype)
    add_fused_head(model)
    use_packed_attention(model)
    return model


def from_packed_row(model: Any, groups: Any) -> Tensor:
    log_probs: Tensor = model(packed=pack(groups).to(DEVICE), fused_lm_head=True).log_probs
    return log_probs.flatten()


def from_padded_rows(model: Any, groups: Any) -> Tensor:
    batch = {name: tensor.to(DEVICE) for name, tensor in padded(groups).items()}
    log_probs: Tensor = model(**batch, fused_lm_head=True).log_probs
    return log_probs[batch["labels"][:, 1:] != -100]


def results(
    model: Any, token_logps: Callable[..., Tensor], seed: int, autocast: bool
) -> dict[str, Tensor]:
    """Log-probs of all scored tokens, and gradients of a weighted sum of them."""
    model.zero_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        logps = token_logps(model, make_groups(LENGTHS, seed))
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(seed))
    (logps.double() * weights.to(DEVICE)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"logps": logps.detach()}


def squared(found: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """Squared distances from the truth, of the log-probs and of all gradients, relative to it."""
    sums = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE)
    for name, exact in truth.items():
        off = found[name].double() - exact
        sums[int(name != "logps")] += torch.stack([off.square().sum(), exact.square().sum()])
    return sums[:, 0] / sums[:, 1]


@pytest.mark.parametrize("precision", ["bf16 weights", "autocast", "fp32"])
def test_packed_row_is_as_exact_as_padded_rows(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_agrees", {})
    autocast = precision == "autocast"
    model = make_qwen2(torch.bfloat16 if precision == "bf16 weights" else torch.float32)
    exact = copy.deepcopy(model).double()
    squares = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE)
    for seed in range(20):
        truth = results(exact, from_padded_rows, seed, False)
        truth = {name: tensor.clone() for name, tensor in truth.items()}
        assert seed or not varlen._agrees
        for i, token_logps in enumerate((from_packed_row, from_padded_rows)):
            squares[i] += squared(results(model, token_logps, seed, autocast), truth)
    packed, padded = (squares / 20).sqrt().tolist()
    print(f"rms distance from fp64, logps and gradients: packed {packed}, padded {padded}")
    for packed_error, padded_error in zip(packed, padded, strict=True):
        assert 0 < padded_error < (1e-5 if precision == "fp32" else 0.05)
        assert packed_error <= 1.1 * padded_error
    kinds = {(kind.dtype, kind.has_window): agrees for kind, agrees in varlen._agrees.items()}
    one_call = precision != "fp32" and varlen._KNOWN and varlen.has_flash(DEVICE)
    assert kinds == ({(torch.bfloat16, w): True for w in (False, True)} if one_call else {})


@pytest.mark.usefixtures("on_device")
class TestOnDevice:
    """With inputs made there: scores that are formed (softcap, sinks), and those that are not."""

    test_segments = staticmethod(
        test_packing_attention.test_segments_attend_as_a_whole_row_with_a_mask
    )
