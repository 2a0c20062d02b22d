"""Fused, exact log-probabilities and losses for preference optimisation (DPO) with TRL."""

__version__ = "0.1.0"

from . import _load, reference  # noqa: F401  _load first: it loads the C++ operators
from .logps import linear_token_logps, token_logps
from .reference import PairLogps, PreferenceLoss, TokenLogps, pair_logps, preference_loss

__all__ = [
    "PairLogps",
    "PreferenceLoss",
    "TokenLogps",
    "linear_token_logps",
    "pair_logps",
    "preference_loss",
    "reference",
    "token_logps",
]
