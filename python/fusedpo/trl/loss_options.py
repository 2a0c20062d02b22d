"""The loss options of DPOConfig: which ones FusedDPOTrainer accepts, and the call that uses them.

An option that would change the loss and is not passed on is refused when the trainer is built,
never ignored.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedpo.reference import PairLogps, PreferenceLoss, preference_loss

_ONLY_SUPPORTED: dict[str, Any] = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "discopop_tau": 0.05,
}


def refuse_unsupported(config: Any) -> None:
    """Raise ValueError naming the first loss option of the DPOConfig that is not supported."""
    for name, supported in _ONLY_SUPPORTED.items():
        value = getattr(config, name)
        if value != supported:
            raise ValueError(
                f"DPOConfig.{name} must be {supported!r} with FusedDPOTrainer; got {value!r}. "
                "Leave it at its default, or use trl.DPOTrainer under fusedpo.trl.patch_trl()."
            )


def sigmoid_loss(
    policy: PairLogps, reference: tuple[Tensor, Tensor], beta: float
) -> PreferenceLoss:
    """The DPO loss of a batch of pairs; `reference` is the chosen and rejected log-probs [B]."""
    return preference_loss(
        policy.chosen, policy.rejected, *reference, loss_type="sigmoid", beta=beta
    )
