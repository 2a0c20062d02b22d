"""What a configuration needs of this machine, refused before anything is half done."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch


def require_packages() -> None:
    """Raise ImportError with the remedy where an extra of fusedpo is not installed."""
    needed = ("trl", "transformers", "datasets", "accelerate", "peft", "yaml", "rich")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"training from a configuration needs {', '.join(missing)}, which is not installed: "
            'pip install "fusedpo[tools]"'
        )


def has_accelerator() -> bool:
    """Whether torch sees a GPU or another accelerator."""
    return torch.accelerator.is_available()


def require_provider(provider: str, model_args: Any) -> None:
    """Check that quantised weights, and unsloth, can be had here.

    Raises:
        ImportError: the library is not installed.
        RuntimeError: it does not run on what torch sees.
    """
    if model_args.load_in_4bit or model_args.load_in_8bit:
        if find_spec("bitsandbytes") is None:
            raise ImportError(
                "use_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes"
            )
        if not has_accelerator():
            raise RuntimeError(
                "use_4bit needs an accelerator, and torch sees none: on a CPU bitsandbytes takes "
                "few shapes of weights, and torch does not vouch for its gradients."
            )
        from transformers.integrations import validate_bnb_backend_availability

        try:
            validate_bnb_backend_availability(raise_exception=True)
        except Exception as error:
            raise RuntimeError(f"use_4bit: bitsandbytes cannot run here: {error}") from error
    if provider == "unsloth":
        if find_spec("unsloth") is None:
            raise ImportError(
                "provider 'unsloth' needs unsloth, which is not installed: pip install unsloth. "
                "Or use provider 'huggingface'."
            )
        if not torch.cuda.is_available() and not torch.xpu.is_available():
            raise RuntimeError(
                "provider 'unsloth' needs a GPU, and torch sees none. Use provider 'huggingface'."
            )
