"""Where bf16, TRL's default, is slower than fp32."""

from __future__ import annotations

from typing import Any

import torch


def slow_bf16(device: torch.device | str | None = None) -> str | None:
    """Return why matrix products in bf16 are slow on a device, or None where they are not.

    On a CPU torch has fast ones where oneDNN has them (x86 with AVX-512, some Arm), and multiplies
    element by element elsewhere. Without a device the accelerator is meant, or the CPU of a machine
    that has none.
    """
    on_cpu = not torch.accelerator.is_available()
    if device is not None:
        on_cpu = torch.device(device).type == "cpu"
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if not on_cpu or supported is None or supported():
        return None
    return (
        "torch has no fast bf16 matrix products for this processor, and needs many times as long "
        "as in fp32"
    )


def has_bf16_weights(model: Any) -> bool:
    return any(each.dtype == torch.bfloat16 for each in model.parameters())
