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
import threading
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
_STATE = struct.Struct("<QQQ")  # what the child is at; records synced so far; calls so far


class Shared:
    """Three numbers that outlive the child, and the one of its calls at which it kills itself."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def reset(self, target: int | str | None, delay: float = 0) -> None:
        """`target`: which of the marked calls to kill at, by number or by name; `delay`: how many
        seconds after its beginning."""
        self.target, self.delay = target, delay
        self.set(ELSEWHERE, 0, 0)

    def set(self, phase: int, synced: int, calls: int) -> None:
        self._memory[: _STATE.size] = _STATE.pack(phase, synced, calls)

    def get(self) -> tuple[int, int, int]:
        phase, synced, calls = _STATE.unpack(self._memory[: _STATE.size])
        return phase, synced, calls

    def begin(self, phase: int) -> None:
        _, synced, calls = self.get()
        self.set(phase, synced, calls + 1)
        if self.target in (calls + 1, NAMES[phase]):
            if not self.delay:
                kill_myself()
            threading.Timer(self.delay, kill_myself).start()

    def end(self, synced: int) -> None:
        _, before, calls = self.get()
        self.set(ELSEWHERE, max(before, synced), calls)


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def mark(owner: Any, name: str, phase: int, shared: Shared) -> None:
    """Say in shared memory when a method runs."""
    original = getattr(owner, name)

    def marked(self: Any, *args: Any, **keywords: Any) -> Any:
        shared.begin(phase)
        result = original(self, *args, **keywords)
        shared.end(self.records if phase == SYNC else 0)
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
        shared.reset(None)
        _, status = os.waitpid(child(lambda: run(path)), 0)
        assert status == 0, f"a run that nothing killed failed with status {status}"
        return snapshot_bytes(path)

    start = time.monotonic()
    want = finish(folder / "reference")
    duration = time.monotonic() - start
    calls = shared.get()[2]
    values = contents(folder / "reference")

    moments = random.Random(seed)
    where: Counter[str] = Counter()
    path, number, resumed = folder / "run0", 0, 0
    while sum(where.values()) < kills:
        # A third of the kills at any moment, the others soon after a call that is drawn.
        kind = moments.random()
        target = None if kind < 0.35 else "merge" if kind < 0.5 else moments.randint(1, calls)
        before = contents(path) if (path / "identity.json").exists() else {}
        shared.reset(target, moments.choice((0, moments.uniform(0, 0.001))))
        pid = child(lambda path=path: run(path))
        if target is None:
            time.sleep(moments.uniform(0, duration))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        phase, synced, _ = shared.get()
        if os.WIFSIGNALED(status):
            where[NAMES[phase]] += 1
        check(path, values, before, synced)
        print(f"{sum(where.values())} kills: {dict(where)}", file=sys.stderr)
        if not os.WIFSIGNALED(status) or moments.random() < 0.3:
            # Finished before the kill, or to be finished now.
            assert finish(path) == want, f"{path} ends with other bytes"
            resumed += 1
            shutil.rmtree(path)
            number += 1
            path = folder / f"run{number}"
    assert finish(path) == want
    return {"kills": kills, "where": dict(where), "resumed": resumed + 1, "records": len(values)}


def check(
    path: pathlib.Path, values: dict[bytes, float], before: dict[bytes, float], synced: int
) -> None:
    """Nothing that was there `before` the run or that a sync confirmed in it is lost, and no value
    is wrong, however the run ended."""
    if not (path / "identity.json").exists():
        assert synced == len(before) == 0
        return
    store = RefStore(path)
    report = store.verify()
    assert report.ok, report.problems
    found = contents(path)
    assert before.items() <= found.items(), f"{path}: records of an earlier run are lost"
    # No record is scored twice, so those of this run come on top.
    assert len(found) >= len(before) + synced, (
        f"{path}: {len(before)} records were there, {synced} were synced, {len(found)} are there"
    )
    assert found.items() <= values.items()


if __name__ == "__main__":
    print(json.dumps(main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
