"""Between the store and tables: columns of data sets, parquet, arrow, and back."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import fusedpo
import numpy as np
import pytest
from fusedpo import StoreError
from fusedpo._precompute.records import Record, keys_of
from fusedpo._store_columns import num_scored, truncate
from installs import needs_native
from store_cases import Records, filled, new_store

pytestmark = needs_native


def paired(records: Records) -> dict[str, Any]:
    """The records as rows of (prompt, chosen, rejected), under keys of their own."""
    half = len(records.completions) // 2
    return {
        "prompt_ids": records.prompts[:half],
        "chosen_ids": records.completions[:half],
        "rejected_ids": records.completions[half:],
    }


def scored(store: fusedpo.RefStore, rows: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Stores a value for every completion of `rows`; returns [2, n]."""
    n = len(rows["prompt_ids"])
    values = -1.0 - np.arange(2 * n).reshape(2, n)
    with store.writer() as w:
        for side, column in zip(values, ("chosen_ids", "rejected_ids"), strict=True):
            keys = fusedpo.record_keys(rows["prompt_ids"], rows[column])
            w.append(
                keys,
                side,
                [num_scored(*row) for row in zip(rows["prompt_ids"], rows[column], strict=True)],
            )
    store.refresh()
    return values


def test_columns_are_added_to_paired_and_unpaired_data_sets(tmp_path: pathlib.Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = paired(Records(40))
    store = new_store(tmp_path)
    values = scored(store, rows)
    for dataset in (rows, datasets.Dataset.from_dict(rows)):
        extended = store.add_columns(dataset)
        assert list(extended["ref_chosen_logps"]) == values[0].tolist()
        assert list(extended["ref_rejected_logps"]) == values[1].tolist()
        assert list(extended["chosen_ids"]) == rows["chosen_ids"]
    # The same completions without their partners have the same values.
    unpaired = {"prompt_ids": rows["prompt_ids"], "completion_ids": rows["rejected_ids"]}
    extended = store.add_columns(datasets.Dataset.from_dict(unpaired))
    assert list(extended["ref_logps"]) == values[1].tolist()
    again = store.add_columns(extended)  # replaces, does not double
    assert again.column_names == extended.column_names


def test_missing_records_are_an_error_that_names_the_first(tmp_path: pathlib.Path) -> None:
    rows = paired(Records(20))
    store = new_store(tmp_path)
    scored(store, {k: v[:7] for k, v in rows.items()})
    with pytest.raises(StoreError, match=r"6 of 20 records .* chosen_ids of row 7") as caught:
        store.add_columns(rows)
    assert caught.value.code == "missing_records"


def test_import_is_the_inverse_of_add_columns(tmp_path: pathlib.Path) -> None:
    rows = paired(Records(20))
    store = new_store(tmp_path / "a")
    values = scored(store, rows)
    other = new_store(tmp_path / "b")
    assert other.import_columns(store.add_columns(rows)) == 20
    assert list(other.add_columns(rows)["ref_chosen_logps"]) == values[0].tolist()
    assert store.merge().snapshot == other.merge().snapshot
    with pytest.raises(StoreError, match="ref_chosen_logps"):
        other.import_columns(rows)
    with pytest.raises(StoreError, match="prompt_ids"):
        other.import_columns({"text": ["a"]})


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("keep_start", [([1, 2, 3], [4, 5]), ([1, 2, 3], [4, 5])]),
        ("keep_end", [([3], [4, 5, 6, 7]), ([], [6, 7, 8, 9, 10])]),
    ],
)
def test_truncation_cuts_as_trl_cuts(mode: str, expected: list[Any]) -> None:
    """What TRL's collator leaves of prompt + completion, and of the completion's mask."""
    prompts = [[1, 2, 3], [1, 2, 3]]
    completions = [[4, 5, 6, 7], [4, 5, 6, 7, 8, 9, 10]]
    assert [truncate(p, c, 5, mode) for p, c in zip(prompts, completions, strict=True)] == expected
    for p, c in zip(prompts, completions, strict=True):
        ids, mask = p + c, [0] * len(p) + [1] * len(c)
        ids, mask = (ids[:5], mask[:5]) if mode == "keep_start" else (ids[-5:], mask[-5:])
        cut = truncate(p, c, 5, mode)
        assert (cut[0] + cut[1], len(cut[1])) == (ids, sum(mask))
        assert truncate(p, c, None, mode) == truncate(p, c, 100, mode) == (p, c)


def test_truncated_rows_are_looked_up_as_they_are_scored(tmp_path: pathlib.Path) -> None:
    rows = {"prompt_ids": [[1, 2]], "chosen_ids": [[3, 4, 5]], "rejected_ids": [[6, 7]]}
    store = new_store(tmp_path)
    short = {"prompt_ids": [[1, 2]], "chosen_ids": [[3, 4]], "rejected_ids": [[6, 7]]}
    values = scored(store, short)
    extended = store.add_columns(rows, max_length=4)
    assert extended["ref_chosen_logps"] == values[0].tolist()
    with pytest.raises(StoreError, match="truncation_mode"):
        store.add_columns(rows, max_length=4, truncation_mode="keep_middle")


def test_imports_count_the_tokens_that_scoring_counts(tmp_path: pathlib.Path) -> None:
    """Under keep_end a prompt may be cut away: then the first token of the completion has nothing
    to be predicted from."""
    rows = {"prompt_ids": [[1]], "completion_ids": [[4, 5, 6, 7]], "ref_logps": [-3.0]}
    store = new_store(tmp_path)
    cut = {"max_length": 4, "truncation_mode": "keep_end"}
    assert store.import_columns(rows, **cut) == 1
    record = Record(np.array([], np.int64), np.array([4, 5, 6, 7]))
    with store.writer() as w:  # as precompute --per-token adds it
        w.append(keys_of([record]), [-3.0], [record.num_tokens], [[-1.0] * 3])
    store.refresh()
    _, logps, num_tokens = store.lookup(keys_of([record]))
    assert (logps.tolist(), num_tokens.tolist()) == ([-3.0], [3])
    assert store.add_columns(rows, **cut)["ref_logps"] == [-3.0]


def test_rows_without_a_token_to_score_are_left_out(tmp_path: pathlib.Path) -> None:
    rows = {"prompt_ids": [[1, 2, 3], [1]], "completion_ids": [[4, 5], [6, 7]]}
    rows["ref_logps"] = [-9.0, -2.0]
    store = new_store(tmp_path)
    assert store.import_columns(rows, max_length=3) == 1  # the first row's prompt fills it
    np.testing.assert_array_equal(store.add_columns(rows, max_length=3)["ref_logps"], [np.nan, -2])
    # What is left is a first token: nothing to predict it from.
    last = {"max_length": 1, "truncation_mode": "keep_end"}
    assert store.import_columns(rows, **last) == 0
    assert store.add_columns(rows, **last)["ref_logps"] == [0.0, 0.0]


def test_values_for_another_number_of_tokens_are_an_error(tmp_path: pathlib.Path) -> None:
    rows = {"prompt_ids": [[9], [1, 2]], "completion_ids": [[9], [6, 7]]}
    store = new_store(tmp_path)
    keys = fusedpo.record_keys(rows["prompt_ids"], rows["completion_ids"])
    with store.writer() as w:
        w.append(keys, [-1.0, -2.0], [1, 3])
    store.refresh()
    with pytest.raises(StoreError, match=r"completion_ids of row 1 has 2 tokens .* value for 3"):
        store.add_columns(rows)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_export_and_import_give_the_same_store(tmp_path: pathlib.Path, suffix: str) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    records = Records(200)
    filled(tmp_path / "a", records, tokens=True)
    store = fusedpo.RefStore(tmp_path / "a", "a")
    extra = Records(50, seed=1)
    with store.writer() as w:
        extra.append(w, slice(None))
    store.refresh()
    path = tmp_path / f"all{suffix}"
    assert store.export(path) == 250
    table = pq.read_table(path) if suffix == ".parquet" else pa.ipc.open_file(path).read_all()
    keys = [bytes(k) for k in table["key"].to_pylist()]
    assert keys == sorted(keys)
    assert table["token_logps"].null_count == 50
    other = new_store(tmp_path / "b")
    assert other.import_columns(table) == 250
    assert store.merge().snapshot == other.merge().snapshot
    assert not list(tmp_path.glob(".*"))


def test_export_names_what_it_can_write(tmp_path: pathlib.Path) -> None:
    store = new_store(tmp_path / "s")
    with pytest.raises(StoreError, match=r"\.parquet or \.arrow"):
        store.export(tmp_path / "x.csv")
    pytest.importorskip("pyarrow")
    with pytest.raises(StoreError, match="cannot write"):
        store.export(tmp_path / "absent" / "x.parquet")


def test_batches_are_sorted_and_complete(tmp_path: pathlib.Path) -> None:
    records = Records(500)
    filled(tmp_path, records, logs=3)
    batches = list(fusedpo.RefStore(tmp_path).batches(size=64))
    keys = np.concatenate([b[0] for b in batches])
    order = np.lexsort(records.keys.T[::-1])
    np.testing.assert_array_equal(keys, records.keys[order])
    np.testing.assert_array_equal(np.concatenate([b[1] for b in batches]), records.logps[order])


def test_snapshot_is_read_without_fusedpo(tmp_path: pathlib.Path) -> None:
    """The example imports the standard library only."""
    records = Records(50)
    filled(tmp_path, records)
    name = fusedpo.RefStore(tmp_path, "a").merge().snapshot
    assert name is not None
    example = pathlib.Path(__file__).parents[2] / "examples" / "read_snapshot.py"
    assert len(example.read_text().splitlines()) <= 30
    result = subprocess.run(
        [sys.executable, "-I", str(example), str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in result.stdout.splitlines()]
    got = {bytes.fromhex(key): (float(logp), int(n)) for key, logp, n in lines}
    expected = zip(records.keys, records.logps, records.num_tokens, strict=True)
    assert got == {k.tobytes(): (logp, n) for k, logp, n in expected}
    content = bytearray((tmp_path / name).read_bytes())
    content[4096] ^= 1
    (tmp_path / name).write_bytes(content)
    broken = subprocess.run(
        [sys.executable, "-I", str(example), str(tmp_path / name)], capture_output=True, check=False
    )
    assert broken.returncode != 0
