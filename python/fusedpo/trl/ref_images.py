"""Which pictures a row of a batch has, so that the key of its record can tell.

The log-probs of a completion depend on the pictures of its prompt, and the pixels of a batch do not
say whose they are: many processors put the patches of all pictures into one tensor. So the digests
are taken of the examples, where these are collated. What a processor makes of a picture is part of
the store's identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEY = "image_digests"
_COLUMNS = ("image", "images")
_WORDS = 8  # of 16 bits
# Above every token id, and within the 32 bits that a key's hash takes of an id.
_FIRST = 1 << 31


def has_images(dataset: Any) -> bool:
    """Whether a data set has pictures, as DPOTrainer tells: by its columns."""
    if dataset is None:
        return False
    names: Any = dataset.column_names  # a stream may not know them
    return any(name in _COLUMNS for name in names or next(iter(dataset), {}))


def is_of_images(name: str) -> bool:
    """Whether an entry of a batch is made of its pictures and token ids alone."""
    return name == KEY or name.startswith(("pixel_", "image_", "mm_token_type_ids"))


def image_settings(processor: Any) -> dict[str, Any]:
    """What a processor does to pictures, as JSON values."""
    settings: dict[str, Any] = json.loads(processor.image_processor.to_json_string())
    return settings


def ids_of_images(example: Mapping[str, Any]) -> NDArray[np.int64]:
    """A 128-bit digest of the pictures of an example as 8 numbers that no token has; -1 without
    pictures.

    Raises:
        TypeError: a picture that is no PIL image, array or tensor.
    """
    found = [example[name] for name in _COLUMNS if example.get(name) is not None]
    images = [image for each in found for image in (each if isinstance(each, list) else [each])]
    if not images:
        return np.full(_WORDS, -1, np.int64)
    digest = hashlib.blake2b(digest_size=2 * _WORDS)
    for image in images:
        for part in _content(image):
            digest.update(len(part).to_bytes(8, "little") + part)
    return np.frombuffer(digest.digest(), "<u2").astype(np.int64) + _FIRST


def _content(image: Any) -> list[bytes]:
    if isinstance(image, Tensor):
        image = image.numpy(force=True)
    if isinstance(image, np.ndarray):
        return [f"{image.dtype.str} {image.shape}".encode(), image.tobytes()]
    if type(image).__module__.startswith("PIL."):
        palette = bytes(image.getpalette() or b"")
        return [f"{image.mode} {image.size}".encode(), palette, image.tobytes()]
    raise TypeError(
        "with ref_store, pictures must be PIL images, arrays or tensors, whose content is known; "
        f"got {type(image).__name__}. Cast the column: dataset.cast_column('images', "
        "datasets.Sequence(datasets.Image()))."
    )


class DigestingCollator:
    """A collator of pairs whose batches tell which pictures each row has: KEY, [2B, 8]."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        # Before the collator, which may change the examples.
        digests = torch.from_numpy(np.stack([ids_of_images(example) for example in examples]))
        batch = self.collator(examples)
        batch[KEY] = torch.cat([digests, digests])
        return batch
