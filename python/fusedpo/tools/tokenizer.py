"""A model's tokenizer, by its path or name."""

from __future__ import annotations

import os
from typing import Any


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model: a folder, or a name on the Hugging Face Hub.

    Raises:
        FileNotFoundError: it can be no name on the Hub, and there is no such folder.
        ImportError, OSError: no transformers, no such tokenizer.
    """
    # A name on the Hub is `model` or `owner/model`.
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if is_path and not os.path.isdir(name):
        raise FileNotFoundError(f"the tokenizer's folder must exist; no such folder: {name}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError('a tokenizer needs transformers; pip install "fusedpo[tools]"') from error
    return AutoTokenizer.from_pretrained(name)
