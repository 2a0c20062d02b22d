"""A packed row is as close to float64 on a GPU as padded rows are; and it is one call there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the fused head needs TRL")

import transformers
from cuda_cases import DEVICE, need_device
from fusedpo._head import add_fused_head
from fusedpo._packing import varlen
from fusedpo._packing.attention import use_packed_attention
from fusedpo._packing.layout import pack
from packing_helpers import VOCABULARY, make_groups, padded, relative_difference
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


def results(model: Any, token_logps: Callable[..., Tensor], autocast: bool) -> dict[str, Tensor]:
    """Log-probs of all scored tokens, and gradients of a weighted sum of them."""
    model.zero_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        logps = token_logps(model, make_groups(LENGTHS))
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(5))
    (logps.double() * weights.to(DEVICE)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"logps": logps.detach()}


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_packed_row_is_as_exact_as_padded_rows(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_agrees", {})
    model = make_qwen2(torch.float32 if autocast else torch.bfloat16)
    exact = copy.deepcopy(model).double()
    truth = results(exact, from_padded_rows, False)
    logps = truth.pop("logps")
    assert not varlen._agrees
    errors = {}
    for token_logps in (from_packed_row, from_padded_rows):
        found = results(model, token_logps, autocast)
        error = (found.pop("logps") - logps).norm() / logps.norm()
        errors[token_logps] = float(error), relative_difference(found, truth)
    print(f"distance from fp64, logps and gradients: {list(errors.values())}")
    for packed_error, padded_error in zip(
        errors[from_packed_row], errors[from_padded_rows], strict=True
    ):
        assert 0 < padded_error < 0.05
        assert packed_error <= 1.3 * padded_error
    kinds = {(kind.dtype, kind.has_window): agrees for kind, agrees in varlen._agrees.items()}
    one_call = varlen._KNOWN and varlen.has_flash(DEVICE)
    assert kinds == ({(torch.bfloat16, w): True for w in (False, True)} if one_call else {})
