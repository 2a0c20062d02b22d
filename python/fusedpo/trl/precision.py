"""A trainer whose matrix products are in bf16 where that is slow."""

from __future__ import annotations

from typing import Any

from fusedpo._bf16 import has_bf16_weights, slow_bf16


def slow_precision(trainer: Any, *, stored_reference: bool) -> str | None:
    """Return what slows a training down that could run in fp32, and how to run it so."""
    slow = slow_bf16(trainer.accelerator.device)
    if slow is None:
        return None
    remedies = []
    if trainer.accelerator.mixed_precision == "bf16":
        # Beside the configuration, accelerate has a launcher, a file and the environment.
        remedies.append(
            "bf16 is on by default, bf16=False turns it off"
            if trainer.args.bf16
            else "accelerate was told to use mixed_precision bf16, 'no' turns it off"
        )
    if has_bf16_weights(trainer.model):
        remedies.append("the model's weights are in bf16, dtype='float32' loads them in fp32")
    if remedies and stored_reference:
        remedies.append("the store must be made in the same precision (autocast, dtype)")
    return f"{slow}: {'; '.join(remedies)}." if remedies else None
