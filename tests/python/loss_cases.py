"""Inputs and options with which every loss of the family can be called; used by the loss tests."""

from __future__ import annotations

from typing import Any

import fusedpo
import torch
from torch import Tensor

TYPES = fusedpo.loss_types()
PAIRED = [name for name, info in TYPES.items() if info.paired]
UNPAIRED = [name for name, info in TYPES.items() if not info.paired]
WITH_REFERENCE = [name for name in PAIRED if "ref_chosen_logps" in TYPES[name].needs]
REFERENCE_FREE = [name for name in PAIRED if name not in WITH_REFERENCE]
SORTING = ("aot", "aot_unpaired")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Every loss with every f-divergence that it allows.
CASES = [
    (name, f)
    for name in PAIRED
    for f in F_DIVERGENCES
    if f == "reverse_kl" or "f_divergence_type" in TYPES[name].options
]


def options_of(name: str, **others: Any) -> dict[str, Any]:
    """Keyword options under which `name` uses everything that it can use."""
    options: dict[str, Any] = {"loss_type": name}
    if "label_smoothing" in TYPES[name].options:
        options["label_smoothing"] = 0.1
    if "alpha" in TYPES[name].options:
        options["alpha"] = 0.25
    if "cpo_alpha" in TYPES[name].options:
        options["cpo_alpha"] = 0.5
    return options | others


def inputs_of(
    pairs: int, dtype: torch.dtype = torch.float64, spread: float = 4.0
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Four log-probs [B] that require gradients, and lengths and chosen_nll; seeded by pytest."""
    logps = [(-30 + spread * torch.randn(pairs, dtype=dtype)).requires_grad_() for _ in range(4)]
    needs = {
        "chosen_lengths": torch.randint(5, 40, (pairs,)),
        "rejected_lengths": torch.randint(5, 40, (pairs,)),
        "chosen_nll": torch.rand((), dtype=dtype).requires_grad_(),
    }
    return logps, needs
