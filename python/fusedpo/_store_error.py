"""The one exception of the reference store. Importing this needs no compiled code."""

from __future__ import annotations

STORE_ERROR_CODES: dict[str, str] = {
    "io": "the operating system refused: permission, full disk, broken device",
    "missing": "a file or directory is not there, or no store is in it",
    "bad_magic": "a file of the store's name pattern is no file of a store",
    "future_version": "written by a newer fusedpo",
    "foreign_endianness": "written with the other byte order",
    "damaged": "bytes that were confirmed as durable have changed",
    "identity": "made with another model, adapter or setting",
    "contradiction": "one key with two values that differ by more than the tolerance",
    "bad_value": "NaN, infinite or positive log-prob, bad token id, wrong shape or type",
    "empty_completion": "a completion without tokens has no log-prob",
    "closed": "the writer was closed, failed earlier, or belongs to another process",
    "taken": "a merge took over the log of a writer that was still alive",
    "read_only": 'the store was opened with mode="r"',
    "missing_records": "records that are needed are not in the store",
    "not_built": "fusedpo was installed without its compiled code",
    "needs_extra": "a package that this needs is not installed",
}


class StoreError(Exception):
    """Every failure of the reference store.

    Attributes:
        code: what kind of failure, a key of `fusedpo.store.STORE_ERROR_CODES`.
        path: the file or directory concerned, or None.
        offset: the position in the file in bytes, or None.

    Example:
        >>> import fusedpo
        >>> try:
        ...     fusedpo.RefStore("/nowhere/refs")
        ... except fusedpo.StoreError as e:
        ...     print(e.code, e.path)
        missing /nowhere/refs
    """

    def __init__(
        self, message: str, code: str, path: str | None = None, offset: int | None = None
    ) -> None:
        super().__init__(message, code, path, offset)  # all of them, so that it can be pickled
        self.message = message
        self.code = code
        self.path = path
        self.offset = offset

    def __str__(self) -> str:
        return self.message
