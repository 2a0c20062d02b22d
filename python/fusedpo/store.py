"""The reference store: log-probs of a reference model, computed once, kept on disk.

A store is a directory: identity.json (what it was made with), logs (one for each writer, append
only) and snapshots (all records sorted, a .safetensors file that everybody can read). The C++ core
does the reading and writing; docs/store_format.md has every byte and every promise.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _store_identity
from ._store_error import STORE_ERROR_CODES, StoreError

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

Keys = NDArray[np.uint8]
IdLists = Union[Sequence[Sequence[int]], tuple[NDArray[np.int64], NDArray[np.int64]]]
_SORT_MEMORY = 200 << 20  # bytes that sorting may take


class Problem(NamedTuple):
    """Something that verify found; offset is in bytes, None where it concerns the whole file."""

    file: str
    offset: int | None
    what: str


class FileInfo(NamedTuple):
    """One file of a store."""

    name: str
    kind: str  # "log" or "snapshot"
    bytes: int
    records: int
    closed: bool  # False: a log whose writer is at work, or died


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found. `problems` lists the first ones, `problem_count` counts all."""

    ok: bool
    records: int  # distinct keys that are intact
    problems: list[Problem] = field(default_factory=list)
    problem_count: int = 0
    notes: list[Problem] = field(default_factory=list)  # harmless: bytes that were never promised
    files: list[FileInfo] = field(default_factory=list)


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did. `kept_logs` were not closed by their writers: merged, but not removed."""

    snapshot: str | None
    records: int
    removed: list[str] = field(default_factory=list)
    kept_logs: list[str] = field(default_factory=list)
    discarded: list[str] = field(default_factory=list)  # bytes never confirmed by a sync


def _native() -> ModuleType:
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


def _as_keys(keys: ArrayLike) -> Keys:
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
    keys: Keys = _native().record_keys(
        *_flat(prompt_ids, "prompt_ids"), *_flat(completion_ids, "completion_ids")
    )
    return keys


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
        token_logps: ArrayLike | Sequence[ArrayLike] | None = None,
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
            _as_keys(keys),
            np.ascontiguousarray(np.asarray(logps, np.float64).reshape(-1)),
            np.ascontiguousarray(counts, np.uint32),
            tokens,
        )

    @staticmethod
    def _flat_tokens(
        token_logps: ArrayLike | Sequence[ArrayLike], counts: NDArray[Any]
    ) -> NDArray[np.float32]:
        if isinstance(token_logps, np.ndarray) and token_logps.ndim == 1:
            if token_logps.dtype != object:
                return np.ascontiguousarray(token_logps, np.float32)
        rows = [np.asarray(row, np.float32).reshape(-1) for row in token_logps]  # type: ignore[union-attr]
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
        self.close()  # also after an exception: what was appended is good


class RefStore:
    """A store of reference log-probs.

    Args:
        path: the directory.
        mode: "r" to read, "a" to write too; "a" makes the directory and the store when they are
            not there.
        identity: what the values depend on, a dict of JSON values; see docs/store_format.md. A new
            store needs one; an old one must have the same (but for its field "info").
        tolerance: by how much two values of one key may differ, relative to the larger one or to 1,
            to be taken for the same. Only a new store takes it (default 1e-6); an old one keeps
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
        native = _native()
        self.path = pathlib.Path(path)
        self.mode = mode
        wanted = None if identity is None else _store_identity.normalised(identity)
        stored = self._read_identity()
        if stored is None:
            if mode == "r":
                raise self._no_store()
            stored = self._create(native, wanted, tolerance)
        if wanted is not None:
            _store_identity.check(wanted, stored[0], self.path / _store_identity.NAME)
        self._identity, self._tolerance = stored
        compared = _store_identity.compared(self._identity)
        self._canonical = _store_identity.canonical(compared)
        self._store: _store.Store = native.Store(str(self.path), self._canonical, self._tolerance)

    def _read_identity(self) -> tuple[dict[str, Any], float] | None:
        path = self.path / _store_identity.NAME
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            raise StoreError(f"cannot read {path}: {e.strerror}", "io", str(path)) from e
        return _store_identity.parse(text, path)

    def _no_store(self) -> StoreError:
        if not self.path.is_dir():
            what = "is not a directory" if self.path.exists() else "does not exist"
            message = f"{self.path} {what}. Check the path"
        else:
            message = f"{self.path} holds no store: there is no {_store_identity.NAME} in it"
        return StoreError(
            f'{message}; `fusedpo precompute` or RefStore(path, "a", identity=...) makes a store',
            "missing",
            str(self.path),
        )

    def _create(
        self, native: ModuleType, identity: dict[str, Any] | None, tolerance: float | None
    ) -> tuple[dict[str, Any], float]:
        if identity is None:
            raise StoreError(
                f"{self.path} holds no store yet, and a new store needs an identity: what its "
                "values depend on (model, adapter, dtype, ...), a dict of JSON values",
                "missing",
                str(self.path),
            )
        try:
            self._make_directory(native)
            leftover = [n for n in sorted(os.listdir(self.path)) if n.endswith(".fdlog")]
        except OSError as e:
            raise StoreError(
                f"cannot make the directory {self.path}: {e.strerror}. Check the path and its "
                "permissions",
                "io",
                str(self.path),
            ) from e
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
        native.create_file(str(self.path), _store_identity.NAME, content)
        stored = self._read_identity()
        if stored is None:
            raise StoreError(f"{self.path} vanished while it was made", "io", str(self.path))
        return stored

    def _make_directory(self, native: ModuleType) -> None:
        made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in made:  # or a power cut takes the directory and all it holds
            native.sync_directory(str(folder.parent))

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
        return self._store.lookup(_as_keys(keys))

    def lookup_tokens(self, keys: ArrayLike) -> tuple[NDArray[np.bool_], list[NDArray[np.float32]]]:
        """Looks the values of single tokens up.

        Returns:
            found bool [N]: whether token values are stored; N float32 arrays of [num_tokens] in
            nats, empty where not found.
        """
        found, values, offsets = self._store.lookup_tokens(_as_keys(keys))
        return found, np.split(values, offsets[1:-1]) if len(found) else []

    def missing(self, keys: ArrayLike, *, tokens: bool = False) -> NDArray[np.bool_]:
        """Tells which of N keys have no value; with `tokens`, also those without token values."""
        return self._store.missing(_as_keys(keys), tokens)

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
        report: Any = _native().verify(
            str(self.path), self._canonical, self._tolerance, limit, _SORT_MEMORY
        )
        return VerifyReport(
            ok=report["problem_count"] == 0,
            records=report["records"],
            problems=[Problem(*p) for p in report["problems"]],
            problem_count=report["problem_count"],
            notes=[Problem(*p) for p in report["notes"]],
            files=[FileInfo(*f) for f in report["files"]],
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
        return self._merge(abandoned, _as_keys(keep_keys))

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

        Raises:
            StoreError: records that are not in the store (code "missing_records").
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
            max_length, truncation_mode: as in `add_columns`.
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

    def batches(self, size: int = 65536) -> Iterable[tuple[Any, ...]]:
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
        files = self.files()
        logs = sum(f.kind == "log" for f in files)
        return f"RefStore({str(self.path)!r}, {self.mode!r}, {len(files) - logs} snapshots, {logs} logs)"


def verify(path: str | os.PathLike[str], *, limit: int = 1000) -> VerifyReport:
    """Checks a store like `RefStore.verify`, also one that `RefStore` refuses to open."""
    native = _native()
    folder = pathlib.Path(path)
    file = folder / _store_identity.NAME
    try:
        identity, tolerance = _store_identity.parse(file.read_bytes(), file)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise StoreError(
            f"{folder} holds no store: there is no {_store_identity.NAME} in it",
            "missing",
            str(folder),
        ) from e
    except OSError as e:
        raise StoreError(f"cannot read {file}: {e.strerror}", "io", str(file)) from e
    text = _store_identity.canonical(_store_identity.compared(identity))
    report: Any = native.verify(str(folder), text, tolerance, limit, _SORT_MEMORY)
    return VerifyReport(
        ok=report["problem_count"] == 0,
        records=report["records"],
        problems=[Problem(*p) for p in report["problems"]],
        problem_count=report["problem_count"],
        notes=[Problem(*p) for p in report["notes"]],
        files=[FileInfo(*f) for f in report["files"]],
    )
