"""Keys of records: a hash of the token ids that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._store_error import StoreError

Keys: TypeAlias = NDArray[np.uint8]
# N lists of ids; or all ids one after another, and the N + 1 offsets that cut them.
IdLists: TypeAlias = Sequence[Sequence[int]] | tuple[NDArray[np.int64], NDArray[np.int64]]


def native() -> ModuleType:
    try:
        from . import _store
    except ImportError as e:
        raise StoreError(
            "the reference store needs fusedpo's compiled code, which is not there "
            f"({e}). Install a C++ compiler (Debian, Ubuntu: apt install g++) and install fusedpo "
            "again; `python -m fusedpo` tells more",
            "not_built",
        ) from e
    return _store


def as_keys(keys: ArrayLike) -> Keys:
    array = np.asarray(keys)
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != 16:
        raise StoreError(
            "keys must be uint8 of shape [N, 16], as fusedpo.record_keys returns them; got "
            f"{array.dtype} {list(array.shape)}",
            "bad_value",
        )
    return np.ascontiguousarray(array)


def _flat(lists: IdLists, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids one after another, and N + 1 offsets."""
    if isinstance(lists, tuple) and len(lists) == 2 and isinstance(lists[0], np.ndarray):
        ids, offsets = np.asarray(lists[0]), np.asarray(lists[1])
        if ids.dtype.kind not in "iu" or offsets.dtype.kind not in "iu":
            raise StoreError(
                f"{name} and their offsets must be integers; got {ids.dtype}, {offsets.dtype}",
                "bad_value",
            )
        return (
            np.ascontiguousarray(ids.reshape(-1), np.int64),
            np.ascontiguousarray(offsets.reshape(-1), np.int64),
        )
    arrays = [np.asarray(row) for row in lists]
    for i, array in enumerate(arrays):
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise StoreError(
                f"{name}[{i}] must be a list of token ids; got {array.dtype} of shape "
                f"{list(array.shape)}",
                "bad_value",
            )
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([array.size for array in arrays], out=offsets[1:])
    flat = np.concatenate(arrays) if offsets[-1] else np.zeros(0, np.int64)
    return np.ascontiguousarray(flat, np.int64), offsets


def record_keys(prompt_ids: IdLists, completion_ids: IdLists) -> Keys:
    """Returns the keys under which log-probs of completions are stored.

    A key is the BLAKE2b-128 hash of the token ids that are scored, with the border between prompt
    and completion in it. It does not depend on the data set, its order or the platform.

    Args:
        prompt_ids: N lists of token ids, without padding; or (ids, offsets): one flat integer
            array and the N + 1 offsets that cut it.
        completion_ids: the same for the completions, as they are scored (after truncation).

    Returns:
        uint8 [N, 16].

    Raises:
        StoreError: an empty completion (code "empty_completion"), an id outside [0, 2^32).

    Example:
        >>> import fusedpo
        >>> fusedpo.record_keys([[1, 2], [1]], [[3], [2, 3]]).shape
        (2, 16)
    """
    keys: Keys = native().record_keys(
        *_flat(prompt_ids, "prompt_ids"), *_flat(completion_ids, "completion_ids")
    )
    return keys
