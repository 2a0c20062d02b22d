"""Writing to the reference store."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._store_error import StoreError
from ._store_keys import as_keys

if TYPE_CHECKING:
    from . import _store


class StoreWriter:
    """Appends records to a log of its own. Made by `RefStore.writer`; use it in a `with`.

    What was appended is durable when `sync()` has returned, or when the `with` has ended. Safe for
    threads; a forked process needs a writer of its own.
    """

    def __init__(self, writer: _store.LogWriter) -> None:
        self._writer = writer

    def append(
        self,
        keys: ArrayLike,
        logps: ArrayLike,
        num_tokens: ArrayLike,
        token_logps: Sequence[ArrayLike] | NDArray[Any] | None = None,
    ) -> None:
        """Appends N records; all or, with an error, none.

        Args:
            keys: uint8 [N, 16] from `record_keys`.
            logps: [N], sums over the completion's tokens, in nats; kept as float64.
            num_tokens: [N], completion tokens, at least 1.
            token_logps: None, or the float32 values of every token, in nats: N arrays of
                num_tokens values, or one flat array. Needed by `ld_alpha`.

        Raises:
            StoreError: NaN, infinite or positive values, an empty completion, wrong shapes; a full
                disk or a failed sync, after which the writer cannot be used any more.
        """
        counts = np.asarray(num_tokens).reshape(-1)
        if counts.size and (counts.dtype.kind not in "iu" or counts.min() < 0):
            raise StoreError("num_tokens must be non-negative integers", "bad_value")
        if counts.size and counts.max() >= 2**31:
            raise StoreError("num_tokens must be below 2^31", "bad_value")
        tokens: NDArray[np.float32] | None = None
        if token_logps is not None:
            tokens = self._flat_tokens(token_logps, counts)
        self._writer.append(
            as_keys(keys),
            np.ascontiguousarray(np.asarray(logps, np.float64).reshape(-1)),
            np.ascontiguousarray(counts, np.uint32),
            tokens,
        )

    @staticmethod
    def _flat_tokens(
        token_logps: Sequence[ArrayLike] | NDArray[Any], counts: NDArray[Any]
    ) -> NDArray[np.float32]:
        if isinstance(token_logps, np.ndarray) and token_logps.dtype.kind == "f":
            return np.ascontiguousarray(token_logps.reshape(-1), np.float32)
        rows = [np.asarray(row, np.float32).reshape(-1) for row in token_logps]
        sizes = [row.size for row in rows]
        if sizes != counts.tolist():
            wrong = next(
                (i for i, (n, m) in enumerate(zip(sizes, counts, strict=False)) if n != m),
                min(len(sizes), len(counts)),
            )
            raise StoreError(
                f"token_logps must hold num_tokens values for every record; record {wrong} does "
                "not",
                "bad_value",
            )
        return np.concatenate(rows) if rows else np.zeros(0, np.float32)

    def sync(self) -> None:
        """Makes everything appended so far durable. Two disk syncs: call it about once a second."""
        self._writer.sync()

    def close(self) -> None:
        """Syncs and marks the log as complete, so that a merge may remove it."""
        self._writer.close()

    @property
    def path(self) -> str | None:
        """The log's file; None before the first append."""
        return self._writer.path or None

    @property
    def records(self) -> int:
        """Records appended so far."""
        return self._writer.records

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Also after an exception: what was appended is good. But then that is the one to be seen.
        with contextlib.nullcontext() if error is None else contextlib.suppress(StoreError):
            self.close()
