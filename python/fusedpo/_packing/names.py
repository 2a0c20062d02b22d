"""How a model's config tells that it takes packed rows; needs nothing but Python."""

from __future__ import annotations

from typing import Any

# The attention implementations that packed attention can stand in for, and the names it then has.
NAMES = {"sdpa": "fusedpo_packed_sdpa", "eager": "fusedpo_packed_eager"}
_FORMER = {name: original for original, name in NAMES.items()}


def former_implementation(name: str | None) -> str | None:
    """Return the attention implementation of a model as it was before it took packed rows."""
    return _FORMER.get(name or "", name)


def takes_packed_rows(model: Any) -> bool:
    """Whether packed attention is on for the model (or for another one with its config)."""
    return getattr(model.config, "_attn_implementation", None) in _FORMER
