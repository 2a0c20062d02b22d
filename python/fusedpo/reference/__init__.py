"""The mathematics of fusedpo in plain PyTorch: definition, fallback, and what tests compare with.

Written to be read, not to be fast. Works on any device and in float64.
"""

from .logps import METRICS, PairLogps, TokenLogps, linear_token_logps, pair_logps, token_logps
from .losses import PreferenceLoss, UnpairedLoss, preference_loss, unpaired_loss

__all__ = [
    "METRICS",
    "PairLogps",
    "PreferenceLoss",
    "TokenLogps",
    "UnpairedLoss",
    "linear_token_logps",
    "pair_logps",
    "preference_loss",
    "token_logps",
    "unpaired_loss",
]
