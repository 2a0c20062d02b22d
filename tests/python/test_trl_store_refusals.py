"""What a reference store cannot serve in a training, and stores that are damaged or missing."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from fusedpo import RefStore, StoreError
from fusedpo.trl import FusedDPOTrainer
from fusedpo.trl.ref_batches import records_of_batch
from test_trl_store import with_store
from trl_helpers import (
    one_thread,  # noqa: F401  a fixture
    train,
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize(
    ("keywords", "options", "message"),
    [
        ({"ref_miss": "guess"}, {}, "ref_miss must be 'compute' or 'error'"),
        ({"ref_identity": "maybe"}, {}, "ref_identity must be 'check' or 'ignore'"),
        ({}, {"sync_ref_model": True}, "ref_store needs a reference that stays as it is"),
    ],
)
def test_what_a_store_cannot_serve_is_refused_before_anything_is_made(
    keywords: Any, options: Any, message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        with_store(tmp_path, tmp_path / "refs", keywords=keywords, **options)
    assert not (tmp_path / "refs").exists()


def test_pixels_of_which_nobody_told_the_rows_are_refused() -> None:
    batch = dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), torch.ones(2, 3))
    with pytest.raises(ValueError, match="the batch also has pixel_values"):
        records_of_batch(batch | {"pixel_values": torch.ones(2, 3, 4, 4)})


@pytest.mark.parametrize("option", [{"ref_miss": "error"}, {"ref_identity": "ignore"}])
def test_options_of_a_store_are_refused_without_one(
    option: dict[str, str], tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=r"need a store\. Pass ref_store"):
        train(FusedDPOTrainer, tmp_path, keywords=option)


def test_a_store_that_is_not_there_is_an_error_where_nothing_may_be_computed(
    tmp_path: pathlib.Path,
) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        with_store(tmp_path, tmp_path / "refs", keywords={"ref_miss": "error"})


def test_a_damaged_store_is_an_error_and_never_a_value(tmp_path: pathlib.Path) -> None:
    with_store(tmp_path, tmp_path / "refs", max_steps=1)
    store = RefStore(tmp_path / "refs", "a")
    snapshot = tmp_path / "refs" / str(store.merge(abandoned=True).snapshot)
    data = bytearray(snapshot.read_bytes())
    data[len(data) // 2] ^= 1
    snapshot.write_bytes(data)
    with pytest.raises(StoreError) as caught:
        with_store(tmp_path, tmp_path / "refs", max_steps=1)
    assert caught.value.code == "damaged"
