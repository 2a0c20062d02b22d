"""The reference store from Python: what was promised is there, in every state of the store."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pathlib
import pickle
import signal
import struct
import subprocess
import sys
import threading
from typing import Any

import fusedpo
import numpy as np
import pytest
from fusedpo.store import verify
from installs import needs_native
from store_cases import IDENTITY, Records, filled, new_store

pytestmark = needs_native


def test_keys_are_the_documented_hash() -> None:
    prompts = [[], [1, 2, 3], [1, 2], list(range(1000))]
    completions = [[0], [4, 5], [3, 4, 5], [4294967295]]
    keys = fusedpo.record_keys(prompts, completions)
    for key, p, c in zip(keys, prompts, completions, strict=True):
        content = struct.pack("<Q", len(p)) + struct.pack(f"<{len(p) + len(c)}I", *p, *c)
        assert key.tobytes() == hashlib.blake2b(content, digest_size=16).digest()


def test_keys_know_the_border_between_prompt_and_completion() -> None:
    keys = fusedpo.record_keys([[1, 2], [1], []], [[3], [2, 3], [1, 2, 3]])
    assert len({key.tobytes() for key in keys}) == 3


def test_keys_from_flat_arrays_equal_keys_from_lists() -> None:
    prompts, completions = [[1, 2], [], [3]], [[4], [5, 6], [7]]
    flat = [
        (np.concatenate([np.asarray(r, t) for r in rows]), np.cumsum([0, *map(len, rows)]))
        for rows, t in ((prompts, np.int32), (completions, np.uint16))
    ]
    np.testing.assert_array_equal(
        fusedpo.record_keys(*flat), fusedpo.record_keys(prompts, completions)
    )
    assert fusedpo.record_keys([], []).shape == (0, 16)


def test_records_are_found_before_and_after_a_merge(tmp_path: pathlib.Path) -> None:
    records, others = Records(500), Records(50, seed=1)
    filled(tmp_path / "s", records, logs=3)
    store = fusedpo.RefStore(tmp_path / "s", "a")
    for merged in (False, True):
        if merged:
            assert store.merge().records == 500
        records.check(store)
        assert len(store) == 500
        assert not store.missing(records.keys).any()
        found, logps, num_tokens = store.lookup(others.keys)
        assert not found.any()
        assert np.isnan(logps).all()
        assert (num_tokens == 0).all()
        assert store.missing(others.keys).all()
        assert store.verify().ok
    assert [f.kind for f in store.files()] == ["snapshot"]
    assert store.lookup(records.keys[:0])[0].shape == (0,)


def test_token_values_come_back_and_plain_records_have_none(tmp_path: pathlib.Path) -> None:
    records = Records(100)
    store = new_store(tmp_path)
    with store.writer() as w:
        records.append(w, slice(0, 40), tokens=True)
        records.append(w, slice(40, 80))
    for merged in (False, True):
        store.merge() if merged else store.refresh()
        found, tokens = store.lookup_tokens(records.keys)
        assert found.tolist() == [True] * 40 + [False] * 60
        for got, expected in zip(tokens[:40], records.tokens[:40], strict=True):
            np.testing.assert_array_equal(got, expected)
        assert all(t.size == 0 and t.dtype == np.float32 for t in tokens[40:])
        assert store.missing(records.keys, tokens=True).tolist() == [False] * 40 + [True] * 60
        records.check(store, slice(0, 80))
    with store.writer() as w:  # values arrive later for records that were there without
        records.append(w, slice(40, 80), tokens=True)
    store.merge()
    assert store.lookup_tokens(records.keys)[0].tolist() == [True] * 80 + [False] * 20
    assert store.verify().ok


def test_only_synced_records_are_seen_and_only_after_refresh(tmp_path: pathlib.Path) -> None:
    records = Records(30)
    store = new_store(tmp_path)
    writer = store.writer()
    assert writer.path is None
    records.append(writer, slice(0, 10))
    store.refresh()
    assert len(store) == 0
    writer.sync()
    assert len(store) == 0
    store.refresh()
    assert len(store) == 10
    records.append(writer, slice(10, 30))
    writer.close()
    store.refresh()
    records.check(store)
    assert writer.records == 30


def test_snapshot_depends_on_the_records_only(tmp_path: pathlib.Path) -> None:
    records = Records(300)
    contents = []
    for logs, tokens in ((1, False), (4, False)):
        folder = tmp_path / f"{logs}"
        filled(folder, records, logs, tokens=tokens)
        store = fusedpo.RefStore(folder, "a", {**IDENTITY, "info": {"torch": "other"}})
        name = store.merge().snapshot
        assert name is not None
        contents.append((name, (folder / name).read_bytes()))
    assert contents[0] == contents[1]


def test_snapshot_is_read_by_safetensors(tmp_path: pathlib.Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    numpy_reader = pytest.importorskip("safetensors.numpy")
    records = Records(200)
    filled(tmp_path, records)
    name = fusedpo.RefStore(tmp_path, "a").merge().snapshot
    columns = numpy_reader.load_file(tmp_path / name)
    assert {k: (v.dtype.str, v.shape) for k, v in columns.items()} == {
        "keys": ("|u1", (200, 16)),
        "logps": ("<f8", (200,)),
        "num_tokens": ("<u4", (200,)),
        "crc32c": ("<u4", (200,)),
    }
    order = np.lexsort(records.keys.T[::-1])
    np.testing.assert_array_equal(columns["keys"], records.keys[order])
    np.testing.assert_array_equal(columns["logps"], records.logps[order])
    with safetensors.safe_open(tmp_path / name, "numpy") as f:
        metadata = f.metadata()
    expected = {k: v for k, v in IDENTITY.items() if k != "info"}
    assert json.loads(metadata["identity"]) == expected
    assert (metadata["format"], metadata["tolerance"]) == ("fusedpo reference store", "1e-06")


def test_identity_is_readable_and_kept(tmp_path: pathlib.Path) -> None:
    store = new_store(tmp_path, tolerance=1e-3)
    content = json.loads((tmp_path / "identity.json").read_text())
    assert content["identity"] == IDENTITY == store.identity
    assert content["tolerance"] == store.tolerance == 1e-3
    again = fusedpo.RefStore(tmp_path, "a", {**IDENTITY, "info": {}}, tolerance=1e-6)
    assert again.tolerance == 1e-3
    assert again.identity == IDENTITY


def test_inspect_describes_the_store_in_json(tmp_path: pathlib.Path) -> None:
    filled(tmp_path, Records(20))
    described = json.loads(json.dumps(fusedpo.RefStore(tmp_path).inspect()))
    assert (described["records"], described["unmerged_records"]) == (20, 20)
    assert described["identity"] == IDENTITY
    assert {f["kind"] for f in described["files"]} == {"log"}


def test_prune_keeps_only_the_wanted_keys(tmp_path: pathlib.Path) -> None:
    records = Records(60)
    filled(tmp_path, records, tokens=True)
    store = fusedpo.RefStore(tmp_path, "a")
    assert store.prune(records.keys[:7]).records == 7
    assert store.missing(records.keys).sum() == 53
    records.check(store, slice(0, 7))


def test_store_works_on_a_read_only_directory(tmp_path: pathlib.Path) -> None:
    """Nothing is created beside the records: neither by verify nor by export or lookups."""
    pytest.importorskip("pyarrow")
    records = Records(100)
    filled(tmp_path / "s", records)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()}
    (tmp_path / "s").chmod(0o555)
    seen: list[str] = []
    sys.addaudithook(
        lambda event, args: (
            seen.append(str(args[0]))
            if event == "open" and str(tmp_path / "s") in str(args[0]) and "w" in str(args[1])
            else None
        )
    )
    store = fusedpo.RefStore(tmp_path / "s")
    records.check(store)
    assert store.verify().ok
    assert store.export(tmp_path / "all.parquet") == 100
    (tmp_path / "s").chmod(0o755)
    assert seen == []
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()} == before


def test_threads_may_share_a_store_and_a_writer(tmp_path: pathlib.Path) -> None:
    records = Records(400)
    store = new_store(tmp_path)
    errors: list[BaseException] = []

    def work(part: slice) -> None:
        try:
            for i in range(part.start, part.stop, 10):
                records.append(writer, slice(i, i + 10))
                writer.sync()
                store.refresh()
                records.check(store, slice(i, i + 10))
        except BaseException as e:
            errors.append(e)

    with store.writer() as writer:
        threads = [
            threading.Thread(target=work, args=(slice(i, i + 100),)) for i in (0, 100, 200, 300)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert errors == []
    assert store.merge().records == 400


def _read_until_complete(path: str, n: int, result: Any) -> None:
    records = Records(n)
    store = fusedpo.RefStore(path)
    last = 0
    while last < n:
        store.refresh()
        found, logps, _ = store.lookup(records.keys)
        if not (logps[found] == records.logps[found]).all() or found.sum() < last:
            result.put(f"wrong values, or {found.sum()} found after {last}")
            return
        last = int(found.sum())
    result.put("ok")


def test_reader_processes_see_a_writer_and_merges_grow_the_store(tmp_path: pathlib.Path) -> None:
    n = 600
    records = Records(n)
    store = new_store(tmp_path)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    readers = [
        context.Process(target=_read_until_complete, args=(str(tmp_path), n, results))
        for _ in range(2)
    ]
    for r in readers:
        r.start()
    for i in range(0, n, 60):
        with store.writer() as w:
            records.append(w, slice(i, i + 60))
        store.merge()
    answers = [results.get(timeout=300) for _ in readers]
    for r in readers:
        r.join()
    assert answers == ["ok", "ok"]


def test_store_can_be_pickled_and_used_after_a_fork(tmp_path: pathlib.Path) -> None:
    records = Records(20)
    filled(tmp_path, records)
    store = fusedpo.RefStore(tmp_path)
    records.check(pickle.loads(pickle.dumps(store)))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            records.check(store)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


KILLED = """
import sys, os
sys.path.insert(0, {tests!r})
from store_cases import Records, new_store
records = Records(100)
w = new_store({path!r}).writer("killed")
records.append(w, slice(0, 50)); w.sync()
records.append(w, slice(50, 100))
print("synced", flush=True)
sys.stdin.read()
"""


def test_killed_writer_loses_only_what_was_not_synced(tmp_path: pathlib.Path) -> None:
    records = Records(100)
    code = KILLED.format(tests=str(pathlib.Path(__file__).parent), path=str(tmp_path / "s"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "synced\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = fusedpo.RefStore(tmp_path / "s", "a")
    records.check(store, slice(0, 50))
    assert store.missing(records.keys[50:]).all()
    kept = store.merge()
    assert len(kept.kept_logs) == 1
    with store.writer("resumed") as w:
        records.append(w, slice(50, 100))
    final = store.merge(abandoned=True)
    assert (final.records, final.kept_logs) == (100, [])
    assert [f.kind for f in store.files()] == ["snapshot"]
    uninterrupted = tmp_path / "u"
    filled(uninterrupted, records)
    name = fusedpo.RefStore(uninterrupted, "a").merge().snapshot
    assert name == final.snapshot
    assert (uninterrupted / name).read_bytes() == (tmp_path / "s" / name).read_bytes()


def test_verify_lists_all_problems_and_counts_beyond_the_limit(tmp_path: pathlib.Path) -> None:
    records = Records(40)
    store = new_store(tmp_path)
    with store.writer("a") as w:
        records.append(w, slice(None))
    with store.writer("b") as w:
        w.append(records.keys[:30], records.logps[:30] - 1, records.num_tokens[:30])
    report = store.verify(limit=5)
    assert not report.ok
    assert report.problem_count == 30
    assert len(report.problems) == 5
    assert "two values" in report.problems[0].what
    assert report.records == 40
    log = next(tmp_path.glob("a-*.fdlog"))
    content = bytearray(log.read_bytes())
    content[64 + 32 * 39] ^= 1
    log.write_bytes(content)
    damaged = verify(tmp_path)
    assert damaged.problem_count == 31
    first = damaged.problems[0]
    assert (first.file, first.offset) == (log.name, 64 + 32 * 39)
