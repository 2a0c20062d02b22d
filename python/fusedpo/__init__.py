"""Fused, exact log-probabilities and losses for preference optimisation (DPO) with TRL."""

__version__ = "0.1.0"

from . import _load, reference  # noqa: F401  _load first: it loads the C++ operators
from ._precompute.filling import PrecomputeReport
from ._precompute.run import precompute
from ._store_error import StoreError
from .logps import linear_token_logps, token_logps
from .losses import LossType, loss_types, preference_loss, unpaired_loss
from .reference import PairLogps, PreferenceLoss, TokenLogps, UnpairedLoss, pair_logps
from .store import RefStore, record_keys

__all__ = [
    "LossType",
    "PairLogps",
    "PrecomputeReport",
    "PreferenceLoss",
    "RefStore",
    "StoreError",
    "TokenLogps",
    "UnpairedLoss",
    "linear_token_logps",
    "loss_types",
    "pair_logps",
    "precompute",
    "preference_loss",
    "record_keys",
    "reference",
    "token_logps",
    "unpaired_loss",
]
