"""The reference store beside LMDB and SQLite: append, merge, open, look up.

    python -m benchmarks.store [--records 10000000] [--output FILE]

Every lookup is compared with what was stored before it is timed. Wall-clock and CPU seconds are
both reported: on a busy machine the CPU seconds tell what the work costs.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import fusedpo
import numpy as np

from benchmarks import common

LOGS = 8
BATCH = 4096  # records or keys per call, what a loop over batches would use
SYNC_EVERY = 256 * BATCH
LOOKUPS = 2_000_000


class Data:
    def __init__(self, n: int) -> None:
        rng = np.random.default_rng(0)
        self.keys = np.frombuffer(rng.bytes(16 * n), np.uint8).reshape(n, 16)
        self.logps = -rng.random(n) * 500
        self.num_tokens = rng.integers(1, 2000, n).astype(np.uint32)
        self.absent = np.frombuffer(rng.bytes(16 * 200_000), np.uint8).reshape(-1, 16)
        self.sample = rng.integers(0, n, min(LOOKUPS, 4 * n))


def timed(call: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def rate(times: dict[str, float], n: int) -> dict[str, float]:
    return {
        **times,
        "per_s": n / times["wall_s"],
        "per_cpu_s": n / max(times["cpu_s"], 1e-9),
    }


def best(call: Callable[[], Any], rounds: int = 5) -> dict[str, float]:
    return min((timed(call) for _ in range(rounds)), key=lambda t: t["wall_s"])


# ---- fusedpo ----------------------------------------------------------------------


def ours_append(store: fusedpo.RefStore, data: Data) -> None:
    n = len(data.keys)
    for log in range(LOGS):
        with store.writer(f"rank{log}") as w:
            begin, end = n * log // LOGS, n * (log + 1) // LOGS
            for i in range(begin, end, BATCH):
                part = slice(i, min(i + BATCH, end))
                w.append(data.keys[part], data.logps[part], data.num_tokens[part])
                if (i - begin) % SYNC_EVERY == 0:
                    w.sync()


def ours_merge(folder: pathlib.Path) -> dict[str, Any]:
    """In a process of its own, so that the peak of resident memory is the merge's."""
    code = (
        "import json, sys, time\n"
        "import fusedpo\n"
        # Not ru_maxrss, which a process inherits from the one that started it.
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith('VmHWM'))\n"
        "before = peak()\n"
        "wall, cpu = time.perf_counter(), time.process_time()\n"
        "report = fusedpo.RefStore(sys.argv[1], 'a').merge()\n"
        "print(json.dumps({'wall_s': time.perf_counter() - wall,"
        " 'cpu_s': time.process_time() - cpu, 'records': report.records,"
        " 'resident_after_import_bytes': before, 'resident_peak_bytes': peak()}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def ours_lookup(store: fusedpo.RefStore, keys: Any) -> None:
    for i in range(0, len(keys), BATCH):
        store.lookup(keys[i : i + BATCH])


def ours(folder: pathlib.Path, data: Data) -> dict[str, Any]:
    n = len(data.keys)
    store = fusedpo.RefStore(folder, "a", identity={"benchmark": n})
    result: dict[str, Any] = {"records": n, "logs": LOGS}
    result["append"] = rate(timed(lambda: ours_append(store, data)), n)
    result["open_with_logs"] = best(lambda: fusedpo.RefStore(folder))
    del store
    result["merge"] = ours_merge(folder)
    result["open"] = best(lambda: fusedpo.RefStore(folder), rounds=20)
    store = fusedpo.RefStore(folder)
    keys = data.keys[data.sample]
    found, logps, num_tokens = store.lookup(keys)  # verifies, and warms the page cache
    assert found.all()
    assert (logps == data.logps[data.sample]).all()
    assert (num_tokens == data.num_tokens[data.sample]).all()
    assert store.missing(data.absent).all()
    result["lookup"] = rate(best(lambda: ours_lookup(store, keys)), len(keys))
    result["lookup_absent"] = rate(best(lambda: ours_lookup(store, data.absent)), len(data.absent))
    result["bytes"] = sum(f.bytes for f in store.files())
    return result


# ---- peers ------------------------------------------------------------------------
# Their append is ours and the merge in one: afterwards everything is in one sorted tree.


def packed(data: Data) -> list[bytes]:
    columns = zip(data.logps.tolist(), data.num_tokens.tolist(), strict=True)
    return [struct.pack("<dI", *row) for row in columns]


def lmdb_peer(folder: pathlib.Path, data: Data) -> dict[str, Any]:
    import lmdb

    n = len(data.keys)
    keys, values = [k.tobytes() for k in data.keys], packed(data)
    folder.mkdir()
    env = lmdb.open(str(folder), map_size=1 << 36)

    def append() -> None:
        for i in range(0, n, SYNC_EVERY):
            with env.begin(write=True) as txn:
                items = zip(keys[i : i + SYNC_EVERY], values[i : i + SYNC_EVERY], strict=True)
                txn.cursor().putmulti(list(items))

    result: dict[str, Any] = {"records": n, "version": ".".join(map(str, lmdb.version()))}
    result["append"] = rate(timed(append), n)
    env.close()
    result["open"] = best(lambda: lmdb.open(str(folder), readonly=True, lock=False).close())
    env = lmdb.open(str(folder), readonly=True, lock=False)
    wanted = [keys[i] for i in data.sample[:LOOKUPS]]

    def lookup() -> None:
        with env.begin() as txn:
            cursor = txn.cursor()
            for i in range(0, len(wanted), BATCH):
                cursor.getmulti(wanted[i : i + BATCH])

    with env.begin() as txn:
        got = dict(txn.cursor().getmulti(wanted[:10_000]))
    assert all(got[keys[i]] == values[i] for i in data.sample[:10_000])
    result["lookup"] = rate(best(lookup, rounds=3), len(wanted))
    env.close()
    result["bytes"] = (folder / "data.mdb").stat().st_blocks * 512
    return result


def sqlite_peer(folder: pathlib.Path, data: Data) -> dict[str, Any]:
    n = len(data.keys)
    keys = [k.tobytes() for k in data.keys]
    folder.mkdir()
    path = folder / "refs.db"
    db = sqlite3.connect(path)
    db.execute("pragma journal_mode = wal")
    db.execute("create table refs (key blob primary key, logp real, num_tokens int) without rowid")
    rows = list(zip(keys, data.logps.tolist(), data.num_tokens.tolist(), strict=True))

    def append() -> None:
        for i in range(0, n, SYNC_EVERY):
            with db:
                db.executemany("insert into refs values (?, ?, ?)", rows[i : i + SYNC_EVERY])

    result: dict[str, Any] = {"records": n, "version": sqlite3.sqlite_version}
    result["append"] = rate(timed(append), n)
    db.close()
    result["open"] = best(lambda: sqlite3.connect(path).execute("select 1").fetchone())
    db = sqlite3.connect(path)
    wanted = [keys[i] for i in data.sample[: LOOKUPS // 20]]

    def lookup() -> None:
        for key in wanted:
            db.execute("select logp, num_tokens from refs where key = ?", (key,)).fetchone()

    for i in data.sample[:1000]:
        row = db.execute("select logp, num_tokens from refs where key = ?", (keys[i],)).fetchone()
        assert row == (data.logps[i], data.num_tokens[i])
    result["lookup"] = rate(best(lookup, rounds=2), len(wanted))
    db.close()
    result["bytes"] = path.stat().st_size
    return result


TARGETS = {  # name -> (path of the figure, bound, whether more is better)
    "append_records_per_s": (("append", "per_s"), 1e6, True),
    "append_records_per_cpu_s": (("append", "per_cpu_s"), 1e6, True),
    "lookup_keys_per_s": (("lookup", "per_s"), 3e6, True),
    "lookup_keys_per_cpu_s": (("lookup", "per_cpu_s"), 3e6, True),
    "open_s": (("open", "wall_s"), 0.010, False),
    "merge_s": (("merge", "wall_s"), 20.0, False),
    "merge_cpu_s": (("merge", "cpu_s"), 20.0, False),
    "merge_resident_bytes": (("merge", "resident_peak_bytes"), 512 * 2**20, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--folder", help="where the stores are made (default: the system's)")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    environment = common.environment()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = pathlib.Path(folder)
        data = Data(arguments.records)
        results["fusedpo"] = ours(root / "fusedpo", data)
        results["lmdb"] = lmdb_peer(root / "lmdb", data)
        results["sqlite"] = sqlite_peer(root / "sqlite", data)
    targets = {}
    for name, ((section, field), bound, more) in TARGETS.items():
        value = results["fusedpo"][section][field]
        targets[name] = {
            "value": value,
            "target": bound,
            "met": value >= bound if more else value <= bound,
        }
    content = {
        "environment": {**environment, "load_average_after": list(os.getloadavg())},
        "targets": targets,
        "results": results,
    }
    for name, target in targets.items():
        print(f"{name:26} {target['value']:14.6g}  target {target['target']:.6g}", target["met"])
    for name, r in results.items():
        append, lookup = r["append"]["per_s"], r["lookup"]["per_s"]
        opened, size = 1e3 * r["open"]["wall_s"], r["bytes"] / r["records"]
        print(
            f"{name:28} append {append:12.0f}/s  lookup {lookup:12.0f}/s  "
            f"open {opened:8.3f} ms  {size:6.1f} bytes/record"
        )
    default = common.RESULTS / common.device_name(environment) / "store.json"
    common.write(arguments.output or default, content)


if __name__ == "__main__":
    main()
