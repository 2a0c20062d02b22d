"""What the store's tests share: records with known values."""

from __future__ import annotations

import pathlib
from typing import Any

import fusedpo
import numpy as np

IDENTITY: dict[str, Any] = {
    "model": {"digest": "0123abcd", "dtype": "float32"},
    "autocast": "bfloat16",
    "temperature": 1.0,
    "info": {"torch": "2.13.0"},
}


class Records:
    """`n` records under hashed keys; the same for the same seed."""

    def __init__(self, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.prompts = [rng.integers(0, 50_000, rng.integers(0, 6)).tolist() for _ in range(n)]
        self.completions = [
            [seed, i, *rng.integers(0, 50_000, rng.integers(0, 6)).tolist()] for i in range(n)
        ]
        self.keys = fusedpo.record_keys(self.prompts, self.completions)
        self.num_tokens = np.array([len(c) for c in self.completions], np.uint32)
        self.tokens = [-rng.random(m).astype(np.float32) * 9 for m in self.num_tokens]
        self.logps = np.array([t.astype(np.float64).sum() for t in self.tokens])

    def append(
        self, writer: fusedpo.store.StoreWriter, part: slice, *, tokens: bool = False
    ) -> None:
        writer.append(
            self.keys[part],
            self.logps[part],
            self.num_tokens[part],
            self.tokens[part] if tokens else None,
        )

    def check(self, store: fusedpo.RefStore, part: slice = slice(None)) -> None:
        """Every record of `part` is there, and right to the last bit."""
        found, logps, num_tokens = store.lookup(self.keys[part])
        assert found.all()
        np.testing.assert_array_equal(logps, self.logps[part])
        np.testing.assert_array_equal(num_tokens, self.num_tokens[part])


def new_store(path: pathlib.Path, **options: Any) -> fusedpo.RefStore:
    return fusedpo.RefStore(path, "a", identity=IDENTITY, **options)


def filled(path: pathlib.Path, records: Records, logs: int = 2, *, tokens: bool = False) -> None:
    """A store with the records in `logs` closed logs."""
    store = new_store(path)
    for i in range(logs):
        with store.writer(f"rank{i}") as w:
            records.append(w, slice(i, None, logs), tokens=tokens)
