"""The reference store: log-probs of a reference model, computed once, kept on disk.

A store is a directory: identity.json (what it was made with), logs (one for each writer, append
only) and snapshots (all records sorted, a .safetensors file that everybody can read). The C++ core
does the reading and writing; docs/store_format.md has every byte and every promise.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _store_identity
from ._store_error import STORE_ERROR_CODES, StoreError
from ._store_keys import Keys, as_keys, native, record_keys
from ._store_reports import FileInfo, MergeReport, Problem, VerifyReport, verify_report
from ._store_writer import StoreWriter

if TYPE_CHECKING:
    from . import _store

__all__ = [
    "STORE_ERROR_CODES",
    "FileInfo",
    "MergeReport",
    "Problem",
    "RefStore",
    "StoreError",
    "StoreWriter",
    "VerifyReport",
    "record_keys",
    "verify",
]

_SORT_MEMORY = 200 << 20  # bytes that sorting may take


class RefStore:
    """A store of reference log-probs.

    Args:
        path: the directory.
        mode: "r" to read, "a" to write too; "a" makes the directory and the store when they are
            not there.
        identity: what the values depend on, a dict of JSON values; see docs/store_format.md. A new
            store needs one; an old one must have the same (but for its field "info").
        tolerance: by how much two values of one key may differ, relative to the larger one or to 32
            nats, to be taken for the same. Only a new store takes it (default 1e-6); an old one keeps
            its own, see `store.tolerance`.

    Raises:
        StoreError: no directory or no store, another identity, a file that is none of the store's.
            Damage of the records is raised by the first call that needs them, so that `verify`
            can be called.

    Example:
        >>> import tempfile
        >>> import fusedpo
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = fusedpo.RefStore(folder.name, "a", identity={"model": "tiny", "dtype": "fp32"})
        >>> keys = fusedpo.record_keys([[1, 2], [1, 2]], [[3, 4], [5]])
        >>> with store.writer() as w:
        ...     w.append(keys[:1], logps=[-2.5], num_tokens=[2])
        >>> store.refresh()
        >>> store.missing(keys).tolist()
        [False, True]
        >>> found, logps, num_tokens = store.lookup(keys)
        >>> logps.tolist(), num_tokens.tolist()
        ([-2.5, nan], [2, 0])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mode: str = "r",
        identity: dict[str, Any] | None = None,
        *,
        tolerance: float | None = None,
    ) -> None:
        if mode not in ("r", "a"):
            raise StoreError(f'mode must be "r" or "a"; got {mode!r}', "bad_value")
        compiled = native()
        self.path = pathlib.Path(path)
        self.mode = mode
        wanted = None if identity is None else _store_identity.normalised(identity)
        stored = _store_identity.read(self.path)
        if stored is None:
            if mode == "r":
                raise _no_store(self.path)
            stored = self._create(compiled, wanted, tolerance)
        if wanted is not None:
            _store_identity.check(wanted, stored[0], self.path / _store_identity.NAME)
        self._identity, self._tolerance = stored
        compared = _store_identity.compared(self._identity)
        self._canonical = _store_identity.canonical(compared)
        self._store: _store.Store = compiled.Store(str(self.path), self._canonical, self._tolerance)

    def _create(
        self, compiled: ModuleType, identity: dict[str, Any] | None, tolerance: float | None
    ) -> tuple[dict[str, Any], float]:
        if identity is None:
            raise StoreError(
                f"{self.path} holds no store yet, and a new store needs an identity: what its "
                "values depend on (model, adapter, dtype, ...), a dict of JSON values",
                "missing",
                str(self.path),
            )
        try:
            self._make_directory(compiled)
            leftover = [n for n in sorted(os.listdir(self.path)) if n.endswith(".fdlog")]
        except OSError as e:
            raise StoreError(
                f"cannot make the directory {self.path}: {e.strerror}. Check the path and its "
                "permissions",
                "io",
                str(self.path),
            ) from e
        # Or another process made the store and its first log meanwhile.
        if leftover and (made := _store_identity.read(self.path)) is not None:
            return made
        if leftover:
            raise StoreError(
                f"{self.path} holds {leftover[0]} but no {_store_identity.NAME}. Restore that "
                "file, or choose another directory",
                "damaged",
                str(self.path),
            )
        chosen = _store_identity.DEFAULT_TOLERANCE if tolerance is None else tolerance
        content = _store_identity.document(identity, chosen)
        # Where another process was first, its file counts and is compared with ours.
        compiled.create_file(str(self.path), _store_identity.NAME, content)
        stored = _store_identity.read(self.path)
        if stored is None:
            raise StoreError(f"{self.path} vanished while it was made", "io", str(self.path))
        return stored

    def _make_directory(self, compiled: ModuleType) -> None:
        made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in made:  # or a power cut takes the directory and all it holds
            compiled.sync_directory(str(folder.parent))

    # ---- reading ------------------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """What the store was made with."""
        identity: dict[str, Any] = _store_identity.normalised(self._identity)  # a copy
        return identity

    @property
    def tolerance(self) -> float:
        """By how much two values of one key may differ, relative to the larger one or to 1."""
        return self._tolerance

    def lookup(
        self, keys: ArrayLike
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.uint32]]:
        """Looks N keys up, in what was durable at open or at `refresh`.

        Returns:
            found bool [N]; logps float64 [N] in nats, NaN where not found; num_tokens uint32 [N].

        Raises:
            StoreError: damaged bytes, contradicting values; never a wrong value.
        """
        return self._store.lookup(as_keys(keys))

    def lookup_tokens(self, keys: ArrayLike) -> tuple[NDArray[np.bool_], list[NDArray[np.float32]]]:
        """Looks the values of single tokens up.

        Returns:
            found bool [N]: whether token values are stored; N float32 arrays of [num_tokens] in
            nats, empty where not found.
        """
        found, values, offsets = self._store.lookup_tokens(as_keys(keys))
        return found, np.split(values, offsets[1:-1]) if len(found) else []

    def missing(self, keys: ArrayLike, *, tokens: bool = False) -> NDArray[np.bool_]:
        """Tells which of N keys have no value; with `tokens`, also those without token values."""
        return self._store.missing(as_keys(keys), tokens)

    def refresh(self) -> None:
        """Makes visible what became durable since the store was opened or refreshed."""
        self._store.refresh()

    def __len__(self) -> int:
        """The number of distinct keys."""
        return self._store.size()

    def files(self) -> list[FileInfo]:
        """The store's files, as of open or refresh."""
        return [FileInfo(*f) for f in self._store.files()]

    def inspect(self) -> dict[str, Any]:
        """Describes the store in JSON values: identity, tolerance, records, files."""
        files = self.files()
        return {
            "path": str(self.path),
            "format": _store_identity.FORMAT,
            "version": _store_identity.VERSION,
            "records": len(self),
            "bytes": sum(f.bytes for f in files),
            "unmerged_records": sum(f.records for f in files if f.kind == "log"),
            "tolerance": self.tolerance,
            "files": [f._asdict() for f in files],
            "identity": self.identity,
        }

    def verify(self, *, limit: int = 1000) -> VerifyReport:
        """Checks every byte that was promised and compares all values of every key.

        Writes nothing; works on a read-only directory. Lists the first `limit` problems.
        """
        return verify_report(
            native().verify(str(self.path), self._canonical, self._tolerance, limit, _SORT_MEMORY)
        )

    # ---- writing ------------------------------------------------------------

    def _check_writable(self, what: str) -> None:
        if self.mode != "a":
            raise StoreError(
                f'{what} needs the store opened with mode="a"; this one was opened with "r"',
                "read_only",
                str(self.path),
            )

    def writer(self, name: str | None = None) -> StoreWriter:
        """Opens a writer with a log of its own; any number of processes may have one.

        `name` (letters, digits, - and _) becomes part of the file's name, for humans.
        """
        self._check_writable("writer()")
        return StoreWriter(self._store.writer("writer" if name is None else name))

    def merge(self, *, abandoned: bool = False) -> MergeReport:
        """Merges all logs and snapshots into one snapshot, then refreshes.

        Readers and writers may be at work meanwhile. A log that its writer has not closed is
        merged but kept: the writer may be alive. `abandoned=True` takes such logs over and removes
        them, and leftovers of interrupted merges: for writers that were killed. A writer that is
        alive after all gets an error at its next sync; on a network file system, where another
        machine may see the change late, use it only when no writer runs.

        Raises:
            StoreError: contradicting values (both are in the message), damaged bytes. Nothing is
                changed then.
        """
        self._check_writable("merge()")
        return self._merge(abandoned, None)

    def prune(self, keep_keys: ArrayLike, *, abandoned: bool = False) -> MergeReport:
        """Merges, and drops every record whose key is not among `keep_keys` (uint8 [N, 16]).

        No writer may be at work.
        """
        self._check_writable("prune()")
        return self._merge(abandoned, as_keys(keep_keys))

    def _merge(self, abandoned: bool, keep: Keys | None) -> MergeReport:
        report: Any = self._store.merge(abandoned, keep)
        return MergeReport(**{**report, "snapshot": report["snapshot"] or None})

    # ---- data sets ----------------------------------------------------------

    def add_columns(
        self,
        dataset: Any,
        *,
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
    ) -> Any:
        """Returns the tokenised data set with the reference's log-probs as columns.

        Args:
            dataset: a `datasets.Dataset`, or a dict of lists, with `prompt_ids`, `chosen_ids`,
                `rejected_ids` (gets `ref_chosen_logps`, `ref_rejected_logps`), or `prompt_ids`,
                `completion_ids` (gets `ref_logps`): token ids without padding, as TRL tokenises.
            max_length, truncation_mode: as in `DPOConfig`, when the ids are not truncated yet.
                Where that leaves no completion (a row that a training drops) the value is NaN;
                where it leaves only the first token of a sequence it is 0.

        Raises:
            StoreError: records that are not in the store (code "missing_records"), or are there for
                another number of tokens ("contradiction").
        """
        from . import _store_columns

        return _store_columns.add_columns(self, dataset, max_length, truncation_mode)

    def import_columns(
        self,
        dataset: Any,
        *,
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
    ) -> int:
        """Stores log-probs that a data set brings along; returns the number of records.

        Args:
            dataset: what `add_columns` returns; or columns `key`, `logps`, `num_tokens` (and
                `token_logps`), as `export` writes them: a `datasets.Dataset`, a `pyarrow.Table`
                or a dict of lists.
            max_length, truncation_mode: as in `add_columns`; rows of which they leave no token to
                score are left out.
        """
        from . import _store_columns

        self._check_writable("import_columns()")
        return _store_columns.import_columns(self, dataset, max_length, truncation_mode)

    def export(self, path: str | os.PathLike[str]) -> int:
        """Writes all records, sorted by key, to a .parquet or .arrow file; returns their number.

        Columns: key (16 bytes), logps (float64), num_tokens (uint32), token_logps (list of float32,
        null where there are none). Needs pyarrow. Works on a read-only store.
        """
        from . import _store_columns

        return _store_columns.export(self, pathlib.Path(path))

    def batches(self, size: int = 65536) -> Iterator[tuple[Any, ...]]:
        """All records that are durable now, sorted by key, in batches.

        Yields:
            keys [n, 16], logps [n], num_tokens [n], token values one after another, and the n + 1
            offsets that cut them.
        """
        records = self._store.sorted(_SORT_MEMORY)
        while (batch := records.next_batch(size)) is not None:
            yield batch

    def __reduce__(self) -> tuple[Any, ...]:
        return RefStore, (str(self.path), self.mode)  # a worker process opens it for itself

    def __repr__(self) -> str:
        return f"RefStore({str(self.path)!r}, {self.mode!r})"


def _no_store(path: pathlib.Path) -> StoreError:
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        message = f"{path} {what}. Check the path"
    else:
        message = f"{path} holds no store: there is no {_store_identity.NAME} in it"
    return StoreError(
        f'{message}; `fusedpo precompute` or RefStore(path, "a", identity=...) makes a store',
        "missing",
        str(path),
    )


def verify(path: str | os.PathLike[str], *, limit: int = 1000) -> VerifyReport:
    """Checks a store like `RefStore.verify`, also one that `RefStore` refuses to open."""
    compiled = native()
    folder = pathlib.Path(path)
    stored = _store_identity.read(folder)
    if stored is None:
        raise _no_store(folder)
    text = _store_identity.canonical(_store_identity.compared(stored[0]))
    return verify_report(compiled.verify(str(folder), text, stored[1], limit, _SORT_MEMORY))
