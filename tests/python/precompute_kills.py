"""Kills real runs of precompute at random moments and resumes them; run by test_precompute_kills.

Arguments: a folder, how many kills, a seed. A child is forked after the imports; it scores,
appends, syncs after every batch and merges, and says in shared memory what it is at. Prints one
JSON object: how many kills, and where they fell.
"""

from __future__ import annotations

import json
import mmap
import os
import pathlib
import random
import shutil
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import datasets
import torch
from datasets import Dataset
from fusedpo import RefStore, precompute
from fusedpo._precompute import filling
from fusedpo.store import StoreWriter
from precompute_helpers import contents, snapshot_bytes
from trl_helpers import make_model, make_pairs, make_tokenizer

ELSEWHERE, WRITE, SYNC, MERGE = range(4)
NAMES = ("elsewhere", "write", "sync", "merge")
_STATE = struct.Struct("<QQ")  # what the child is at; records confirmed by a sync so far


class Shared:
    """Two numbers that outlive the child."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.set(ELSEWHERE, 0)

    def set(self, phase: int, synced: int) -> None:
        self._memory[: _STATE.size] = _STATE.pack(phase, synced)

    def get(self) -> tuple[int, int]:
        phase, synced = _STATE.unpack(self._memory[: _STATE.size])
        return phase, synced


def mark(owner: Any, name: str, phase: int, shared: Shared) -> None:
    """Say in shared memory when a method runs."""
    original = getattr(owner, name)

    def marked(self: Any, *args: Any, **keywords: Any) -> Any:
        synced = shared.get()[1]
        shared.set(phase, synced)
        result = original(self, *args, **keywords)
        if phase == SYNC:
            synced = max(synced, self.records)
        shared.set(ELSEWHERE, synced)
        return result

    setattr(owner, name, marked)


def child(body: Callable[[], None]) -> int:
    """Fork, run `body` there, return the process id."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return pid


def main(folder: pathlib.Path, kills: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)  # before the first fork: no other thread may be there
    datasets.disable_progress_bars()
    model, tokenizer = make_model(), make_tokenizer()
    data = Dataset.from_list(make_pairs(40))
    filling.SYNC_SECONDS = 0.0  # as if every batch took a second
    shared = Shared()
    mark(StoreWriter, "append", WRITE, shared)
    mark(StoreWriter, "sync", SYNC, shared)
    mark(StoreWriter, "close", SYNC, shared)
    mark(RefStore, "merge", MERGE, shared)

    def run(path: pathlib.Path) -> None:
        precompute(
            model,
            data,
            str(path),
            processing_class=tokenizer,
            autocast="no",
            max_tokens_per_batch=40,
        )
        RefStore(path, "a").merge(abandoned=True)

    def finish(path: pathlib.Path) -> bytes:
        _, status = os.waitpid(child(lambda: run(path)), 0)
        assert status == 0, f"a run that nothing killed failed with status {status}"
        return snapshot_bytes(path)

    start = time.monotonic()
    want = finish(folder / "reference")
    duration = time.monotonic() - start
    values = contents(folder / "reference")

    moments = random.Random(seed)
    where: Counter[str] = Counter()
    path, number, resumed = folder / "run0", 0, 0
    while sum(where.values()) < kills:
        shared.set(ELSEWHERE, 0)
        pid = child(lambda path=path: run(path))
        time.sleep(moments.uniform(0, duration))
        if moments.random() < 0.5:
            wait_for_the_disk(shared, moments)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        phase, synced = shared.get()
        if os.WIFSIGNALED(status):
            where[NAMES[phase]] += 1
        check(path, values, synced)
        if not os.WIFSIGNALED(status) or moments.random() < 0.4:
            # Finished before the kill, or to be finished now.
            assert finish(path) == want, f"{path} ends with other bytes"
            resumed += 1
            shutil.rmtree(path)
            number += 1
            path = folder / f"run{number}"
    assert finish(path) == want
    return {"kills": kills, "where": dict(where), "resumed": resumed + 1, "records": len(values)}


def wait_for_the_disk(shared: Shared, moments: random.Random) -> None:
    deadline = time.monotonic() + 0.2
    while shared.get()[0] == ELSEWHERE and time.monotonic() < deadline:
        pass
    time.sleep(moments.uniform(0, 0.002))


def check(path: pathlib.Path, values: dict[bytes, float], synced: int) -> None:
    """Nothing that a sync confirmed is lost, and no value is wrong, however the run ended."""
    if not (path / "identity.json").exists():
        assert synced == 0
        return
    store = RefStore(path)
    report = store.verify()
    assert report.ok, report.problems
    found = contents(path)
    assert len(found) >= synced, f"{path}: {synced} records were synced, {len(found)} are there"
    assert found.items() <= values.items()


if __name__ == "__main__":
    print(json.dumps(main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
