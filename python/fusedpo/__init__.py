"""Fused, exact log-probabilities and losses for preference optimisation (DPO) with TRL."""

__version__ = "0.1.0"

from . import _load  # noqa: F401  loads the C++ operators where they are built
