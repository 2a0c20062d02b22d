"""Every failure of the store is a StoreError with code, path, offset and a remedy."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import fusedpo
import numpy as np
import pytest
from fusedpo import StoreError, _store_identity
from fusedpo.store import STORE_ERROR_CODES
from installs import copy_package, needs_native
from store_cases import IDENTITY, Records, filled, new_store
from test_import import run


def error_of(call: Callable[[], Any]) -> StoreError:
    with pytest.raises(StoreError) as caught:
        call()
    assert caught.value.code in STORE_ERROR_CODES
    assert len(str(caught.value)) > 20
    return caught.value


def only(folder: pathlib.Path, pattern: str) -> pathlib.Path:
    (found,) = folder.glob(pattern)
    return found


def patch(path: pathlib.Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        f.write(content)


def with_crc(header: bytes) -> bytes:
    """A log's header with the checksum that belongs to it."""
    crc = fusedpo._store.crc32c(header[:60])
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return header[:60] + masked.to_bytes(4, "little")


def merged(folder: pathlib.Path, records: Records) -> pathlib.Path:
    filled(folder, records)
    name = fusedpo.RefStore(folder, "a").merge().snapshot
    assert name is not None
    return folder / name


def test_error_keeps_its_fields_through_pickle() -> None:
    error = StoreError("what", "damaged", "/p", 7)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.code, again.path, again.offset) == ("what", "damaged", "/p", 7)


@needs_native
@pytest.mark.parametrize("mode", ["r", "a"])
def test_missing_directory_or_store(tmp_path: pathlib.Path, mode: str) -> None:
    for path in (tmp_path / "absent", tmp_path):
        e = error_of(lambda p=path: fusedpo.RefStore(p, mode))
        assert (e.code, e.path) == ("missing", str(path))
    e = error_of(lambda: fusedpo.store.verify(tmp_path))
    assert e.code == "missing"


@needs_native
def test_unwritable_place(tmp_path: pathlib.Path) -> None:
    """Below a file nobody can write, root neither."""
    (tmp_path / "file").write_text("x")
    e = error_of(lambda: new_store(tmp_path / "file" / "s"))
    assert e.code == "io"
    assert "permissions" in str(e)
    e = error_of(lambda: new_store(tmp_path / "file"))
    assert e.code == "io"


@needs_native
def test_directory_that_vanished_while_writing(tmp_path: pathlib.Path) -> None:
    store = new_store(tmp_path / "s")
    writer = store.writer()
    (tmp_path / "s" / "identity.json").unlink()
    (tmp_path / "s").rmdir()
    e = error_of(lambda: Records(1).append(writer, slice(None)))
    assert e.code == "missing"
    assert error_of(store.refresh).code == "missing"


@needs_native
def test_another_identity_names_the_fields_that_differ(tmp_path: pathlib.Path) -> None:
    new_store(tmp_path)
    other = {**IDENTITY, "model": {"digest": "ffff", "dtype": "float32"}, "adapter": None}
    e = error_of(lambda: fusedpo.RefStore(tmp_path, identity=other))
    assert e.code == "identity"
    assert 'model.digest: the store has "0123abcd", this run has "ffff"' in str(e)
    assert "adapter" in str(e)
    assert "dtype" not in str(e)
    fusedpo.RefStore(tmp_path, identity={**IDENTITY, "info": None})  # told, not compared


@needs_native
def test_file_of_another_store(tmp_path: pathlib.Path) -> None:
    records = Records(10)
    filled(tmp_path / "a", records, logs=1)
    snapshot = merged(tmp_path / "b", records)
    fusedpo.RefStore(tmp_path / "c", "a", identity={"model": "another"})
    for file in (only(tmp_path / "a", "*.fdlog"), snapshot):
        copy = tmp_path / "c" / file.name
        copy.write_bytes(file.read_bytes())
        e = error_of(lambda: fusedpo.RefStore(tmp_path / "c"))
        assert (e.code, e.path) == ("identity", str(copy))
        report = fusedpo.store.verify(tmp_path / "c")
        assert (report.ok, report.problems[0].file) == (False, file.name)
        copy.unlink()


@needs_native
def test_log_headers_of_others(tmp_path: pathlib.Path) -> None:
    filled(tmp_path, Records(10), logs=1)
    log = only(tmp_path, "*.fdlog")
    header = log.read_bytes()[:64]
    for at, content, code in (
        (0, b"notmagic", "bad_magic"),
        (12, (2).to_bytes(4, "little"), "future_version"),
        (8, (0x01020304).to_bytes(4, "big"), "foreign_endianness"),
    ):
        changed = with_crc(header[:at] + content + header[at + len(content) :])
        patch(log, 0, changed)
        e = error_of(lambda: fusedpo.RefStore(tmp_path))
        assert (e.code, e.path) == (code, str(log))
        assert e.offset == at
        assert not fusedpo.store.verify(tmp_path).ok
    patch(log, 0, header)
    assert fusedpo.RefStore(tmp_path).verify().ok


@needs_native
def test_snapshot_headers_of_others(tmp_path: pathlib.Path) -> None:
    snapshot = merged(tmp_path, Records(10))
    whole = snapshot.read_bytes()
    for old, new, code in (
        (b'"version":"1"', b'"version":"2"', "future_version"),
        (b"fusedpo reference", b"a language model ", "bad_magic"),
    ):
        snapshot.write_bytes(whole.replace(old, new))
        e = error_of(lambda: fusedpo.RefStore(tmp_path))
        assert (e.code, e.path) == (code, str(snapshot))
    snapshot.write_bytes(whole[:-1])
    store = fusedpo.RefStore(tmp_path)
    assert error_of(lambda: len(store)).code == "damaged"


@needs_native
def test_damage_is_raised_with_file_and_offset_and_repairs_itself_nowhere(
    tmp_path: pathlib.Path,
) -> None:
    records = Records(10)
    filled(tmp_path, records, logs=1)
    log = only(tmp_path, "*.fdlog")
    patch(log, 64 + 3 * 32 + 17, b"\xff")
    before = log.read_bytes()
    store = fusedpo.RefStore(tmp_path, "a")
    for call in (
        lambda: store.lookup(records.keys),
        lambda: store.missing(records.keys),
        lambda: store.lookup_tokens(records.keys),
        lambda: len(store),
        store.merge,
        lambda: store.prune(records.keys),
        lambda: list(store.batches()),
    ):
        e = error_of(call)
        assert (e.code, e.path, e.offset) == ("damaged", str(log), 64 + 3 * 32)
        assert "score" in str(e)
    assert log.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@needs_native
def test_damaged_identity(tmp_path: pathlib.Path) -> None:
    store = new_store(tmp_path)
    path = tmp_path / "identity.json"
    text = path.read_text()
    for content, code in (
        (text.replace("0123abcd", "0123abce"), "damaged"),
        (text.replace("2.13.0", "2.14.0"), "damaged"),
        (text[:100], "damaged"),
        ("", "damaged"),
        ("[]", "bad_magic"),
        ('{"format": "something else"}', "bad_magic"),
        (text.replace('"version": 1', '"version": 9'), "future_version"),
        ("\xff", "damaged"),
    ):
        path.write_text(content, encoding="latin-1")
        for call in (lambda: fusedpo.RefStore(tmp_path), lambda: fusedpo.store.verify(tmp_path)):
            e = error_of(call)
            assert (e.code, e.path) == (code, str(path)), content
    path.unlink()
    with store.writer() as w:
        Records(1).append(w, slice(None))
    e = error_of(lambda: new_store(tmp_path))
    assert e.code == "damaged"
    assert "identity.json" in str(e)


@needs_native
def test_every_flipped_bit_of_identity_is_noticed_or_changes_nothing(
    tmp_path: pathlib.Path,
) -> None:
    identity = {"m": "x", "n": [1, 2.5]}
    fusedpo.RefStore(tmp_path, "a", identity=identity)
    path = tmp_path / "identity.json"
    whole = path.read_bytes()
    noticed = 0
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            store = fusedpo.RefStore(tmp_path)
        except StoreError:
            noticed += 1
            continue
        assert store.identity == identity  # white space
        assert store.tolerance == 1e-6
    assert noticed > 6 * len(whole)


@needs_native
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-9, 3.0])
def test_values_that_are_no_log_probs(tmp_path: pathlib.Path, value: float) -> None:
    records = Records(5)
    store = new_store(tmp_path)
    logps = records.logps.copy()
    logps[3] = value
    tokens = [t.copy() for t in records.tokens]
    tokens[3][0] = value
    with store.writer() as w:
        e = error_of(lambda: w.append(records.keys, logps, records.num_tokens))
        assert e.code == "bad_value"
        assert "record 3" in str(e)
        e = error_of(lambda: w.append(records.keys, records.logps, records.num_tokens, tokens))
        assert e.code == "bad_value"
        assert "record 3" in str(e)
    assert len(list(tmp_path.iterdir())) == 1  # nothing was stored


@needs_native
def test_empty_completions(tmp_path: pathlib.Path) -> None:
    assert error_of(lambda: fusedpo.record_keys([[1], [2]], [[3], []])).code == "empty_completion"
    records = Records(3)
    with new_store(tmp_path).writer() as w:
        e = error_of(lambda: w.append(records.keys, records.logps, [1, 0, 1]))
    assert e.code == "empty_completion"
    assert "record 1" in str(e)


@needs_native
def test_wrong_shapes_and_types(tmp_path: pathlib.Path) -> None:
    r = Records(3)
    store = new_store(tmp_path)
    w = store.writer()
    for call in (
        lambda: store.lookup(r.keys[:, :8]),
        lambda: store.lookup(r.keys.astype(np.int64)),
        lambda: store.lookup(r.keys[0]),
        lambda: w.append(r.keys, r.logps[:2], r.num_tokens),
        lambda: w.append(r.keys, r.logps, [1.5, 2.0, 3.0]),
        lambda: w.append(r.keys, r.logps, [1, -2, 3]),
        lambda: w.append(r.keys, r.logps, [1, 2**31, 3]),
        lambda: w.append(r.keys, r.logps, r.num_tokens, r.tokens[:2]),
        lambda: w.append(r.keys, r.logps, r.num_tokens, [t[:1] for t in r.tokens]),
        lambda: w.append(r.keys, r.logps, r.num_tokens, np.zeros(1, np.float32)),
        lambda: fusedpo.record_keys([[1]], [[2], [3]]),
        lambda: fusedpo.record_keys([[1]], [[-100]]),
        lambda: fusedpo.record_keys([[1]], [[2**32]]),
        lambda: fusedpo.record_keys([[1]], [[1.5]]),
        lambda: fusedpo.record_keys([1], [[1]]),
        lambda: store.writer("a/b"),
        lambda: store.writer(""),
        lambda: fusedpo.RefStore(tmp_path, "w"),
        lambda: new_store(tmp_path / "x", tolerance=-1.0),
        lambda: new_store(tmp_path / "x", tolerance=float("nan")),
        lambda: fusedpo.RefStore(tmp_path / "x", "a", identity={"a": object()}),
        lambda: fusedpo.RefStore(tmp_path / "x", "a", identity={"a": float("nan")}),
        lambda: fusedpo.RefStore(tmp_path / "x", "a", identity=["a"]),  # type: ignore[arg-type]
    ):
        assert error_of(call).code == "bad_value"
    w.close()
    assert [p.name for p in tmp_path.iterdir() if p.suffix] == ["identity.json"]


@needs_native
def test_read_only_stores_refuse_to_write(tmp_path: pathlib.Path) -> None:
    new_store(tmp_path)
    store = fusedpo.RefStore(tmp_path)
    for call in (
        store.writer,
        store.merge,
        lambda: store.prune(Records(1).keys),
        lambda: store.import_columns({}),
    ):
        assert error_of(call).code == "read_only"


@needs_native
def test_closed_writers_and_writers_of_other_processes(tmp_path: pathlib.Path) -> None:
    records = Records(4)
    store = new_store(tmp_path)
    writer = store.writer()
    records.append(writer, slice(0, 2))
    writer.close()
    writer.close()
    assert error_of(lambda: records.append(writer, slice(2, 4))).code == "closed"
    parent = store.writer()
    records.append(parent, slice(2, 3))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            records.append(parent, slice(3, 4))
        except StoreError as e:
            code = 0 if e.code == "closed" else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    parent.close()
    store.refresh()
    records.check(store, slice(0, 3))


@needs_native
def test_contradicting_values_are_an_error_with_both(tmp_path: pathlib.Path) -> None:
    records = Records(3)
    store = new_store(tmp_path)
    with store.writer("a") as w:
        w.append(records.keys, [-7.25, -2.0, -3.0], records.num_tokens)
    with store.writer("b") as w:
        w.append(records.keys[:1], [-7.5], records.num_tokens[:1])
    store.refresh()
    files = sorted(p.name for p in tmp_path.iterdir())
    for call in (store.merge, lambda: store.lookup(records.keys)):
        e = error_of(call)
        assert e.code == "contradiction"
        assert "7.25" in str(e)
        assert "7.5" in str(e)
    assert sorted(p.name for p in tmp_path.iterdir()) == files


@needs_native
def test_a_larger_tolerance_takes_close_values_for_the_same(tmp_path: pathlib.Path) -> None:
    records = Records(1)
    store = new_store(tmp_path, tolerance=0.05)
    for name, value in (("a", -7.25), ("b", -7.5)):
        with store.writer(name) as w:
            w.append(records.keys, [value], records.num_tokens)
    assert store.merge().records == 1
    assert store.lookup(records.keys)[1].tolist() == [-7.5]


@needs_native
def test_full_disk_keeps_what_was_synced(tmp_path: pathlib.Path) -> None:
    """A limit on the size of files stands for the full disk: a short write, then an error."""
    records = Records(3000)
    store = new_store(tmp_path)
    writer = store.writer()
    records.append(writer, slice(0, 100))
    writer.sync()
    records.append(writer, slice(100, 3000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        e = error_of(writer.sync)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert e.code == "io"
    assert e.path is not None
    e = error_of(writer.close)
    assert e.code == "closed"
    store.refresh()
    records.check(store, slice(0, 100))
    assert len(store) == 100
    report = store.verify()
    assert report.ok
    assert report.notes[0].offset == 64 + 100 * 32 + 64


@needs_native
def test_a_with_shows_the_error_that_broke_the_writer(tmp_path: pathlib.Path) -> None:
    records = Records(3000)
    store = new_store(tmp_path)

    def write(*, syncing: bool, interrupted: bool = False) -> None:
        with store.writer() as writer:
            records.append(writer, slice(0, 3000))
            if interrupted:
                assert error_of(writer.sync).code == "io"
                raise KeyboardInterrupt
            if syncing:
                writer.sync()

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        assert error_of(lambda: write(syncing=True)).code == "io"
        # Without another error that of closing is raised.
        assert error_of(lambda: write(syncing=False)).code == "io"
        # Nor does a broken writer hide an interruption.
        with pytest.raises(KeyboardInterrupt):
            write(syncing=True, interrupted=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@needs_native
def test_a_store_made_meanwhile_by_another_process_is_opened(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its identity and its first log appear between our look at the one and at the other."""
    filled(tmp_path, Records(3))
    read, looks = _store_identity.read, []
    monkeypatch.setattr(
        _store_identity,
        "read",
        lambda folder: read(folder) if looks else looks.append(folder),
    )
    assert len(new_store(tmp_path)) == 3


@needs_native
def test_install_without_compiled_code_says_so(tmp_path: pathlib.Path) -> None:
    for module in copy_package(tmp_path).glob("_store*.so"):
        module.unlink()
    result = run(
        "import fusedpo\n"
        "for call in (lambda: fusedpo.record_keys([[1]], [[2]]), lambda: fusedpo.RefStore('/x')):\n"
        "    try:\n"
        "        call()\n"
        "    except fusedpo.StoreError as e:\n"
        "        print(e.code, 'C++ compiler' in str(e))\n",
        tmp_path,
    )
    assert result.stdout == "not_built True\n" * 2, result.stderr


@needs_native
def test_identity_may_be_created_by_many_processes_at_once(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys, json, fusedpo\n"
        "i = int(sys.argv[2])\n"
        "try:\n"
        "    fusedpo.RefStore(sys.argv[1], 'a', identity={'model': 'x', 'rank': i // 3})\n"
        "    print('ok')\n"
        "except fusedpo.StoreError as e:\n"
        "    print(e.code)\n"
    )
    import subprocess

    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "deep" / "s"), str(i)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    answers = [p.communicate()[0].strip() for p in processes]
    assert sorted(answers) in (["identity", "ok", "ok", "ok"], ["identity"] * 3 + ["ok"])
    content = json.loads((tmp_path / "deep" / "s" / "identity.json").read_text())
    assert content["identity"]["model"] == "x"
    assert [p.name for p in (tmp_path / "deep" / "s").iterdir()] == ["identity.json"]
