"""Which ways to split one model or one sequence over processes the loss survives.

Data parallelism (DDP, FSDP, ZeRO) leaves whole sequences on each process, and so does tensor
parallelism, whose head the fused head gathers. The others cut sequences, while the sum over a
completion, and its mask, are taken on each process.
"""

from __future__ import annotations

from typing import Any


def require_whole_sequences(accelerator: Any, *, stored_reference: bool) -> None:
    """Check an accelerator's parallelism.

    Raises:
        ValueError: context or sequence parallelism, or tensor parallelism with a stored reference;
            the message names the setting.
    """
    parallelism = accelerator.parallelism_config
    if parallelism is None:
        return
    for name in ("cp_size", "sp_size"):
        size = vars(parallelism).get(name, 1)  # accelerate has had sp_size since 1.12
        if size > 1:
            raise ValueError(
                f"ParallelismConfig.{name} must be 1: a process has to hold whole completions to "
                f"sum their log-probs; got {size}. Use FSDP, ZeRO or tensor parallelism instead."
            )
    if stored_reference and parallelism.tp_size > 1:
        raise ValueError(
            "ParallelismConfig.tp_size must be 1 with ref_store or precompute_ref_log_probs, which "
            f"give each process records of its own to score; got {parallelism.tp_size}. Pass "
            "ref_model instead."
        )
