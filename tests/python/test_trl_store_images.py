"""A reference store of pictures and text: records are told apart by both."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")
pytest.importorskip("PIL", reason="a processor of pictures needs Pillow")

from fusedpo import StoreError
from fusedpo.trl import FusedDPOTrainer
from fusedpo.trl.ref_images import ids_of_images
from PIL import Image
from precompute_helpers import contents
from test_trl_shadow_vision import make_processor, make_vision_model, setup_of, with_images
from trl_helpers import (
    assert_equal_logs,
    conversational,
    logged,
    lora,
    make_pairs,
    one_thread,  # noqa: F401  a fixture
    train,
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

ROWS = with_images(conversational(make_pairs(8)))


def setup(rows: list[dict[str, Any]], **keywords: Any) -> dict[str, Any]:
    """LoRA: the reference is the model with its adapter off."""
    made = setup_of(rows)
    del made["keywords"]["ref_model"]
    made["keywords"] |= {"peft_config": lora(), **keywords}
    return made | {"max_steps": 2}


def test_logs_equal_those_with_an_online_reference(tmp_path: pathlib.Path) -> None:
    refs = tmp_path / "refs"
    online = train(FusedDPOTrainer, tmp_path, **setup(ROWS))
    first = train(FusedDPOTrainer, tmp_path, **setup(ROWS, ref_store=refs))
    scored = contents(refs)
    assert len(scored) == 16
    second = train(FusedDPOTrainer, tmp_path, **setup(ROWS, ref_store=refs, ref_miss="error"))
    for trainer in (first, second):
        assert_equal_logs(logged(trainer), logged(online))
    assert contents(refs) == scored


def test_the_same_text_under_another_picture_is_another_record(tmp_path: pathlib.Path) -> None:
    refs = tmp_path / "refs"
    train(FusedDPOTrainer, tmp_path, **setup(ROWS, ref_store=refs))
    turned = [
        row | {"images": [other["images"][0]]}
        for row, other in zip(ROWS, ROWS[1:] + ROWS[:1], strict=True)
    ]
    with pytest.raises(LookupError, match="records of a batch"):
        train(FusedDPOTrainer, tmp_path, **setup(turned, ref_store=refs, ref_miss="error"))


def test_what_the_processor_does_to_pictures_is_part_of_the_identity(
    tmp_path: pathlib.Path,
) -> None:
    refs = tmp_path / "refs"
    train(FusedDPOTrainer, tmp_path, **setup(ROWS, ref_store=refs))
    processor = make_processor()
    processor.image_processor.do_normalize = False
    with pytest.raises(StoreError, match=r"images\.do_normalize"):
        train(FusedDPOTrainer, tmp_path, **setup(ROWS, ref_store=refs, processing_class=processor))


def test_full_fine_tuning_loads_no_reference_but_for_what_is_missing(
    tmp_path: pathlib.Path,
) -> None:
    processor = make_processor()
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    make_vision_model(image_token).save_pretrained(tmp_path / "model")
    runs = []
    for keywords in ({}, {"ref_store": tmp_path / "refs"}, {"ref_store": tmp_path / "refs"}):
        made = setup(ROWS, processing_class=processor, peft_config=None, **keywords)
        runs.append(train(FusedDPOTrainer, tmp_path, **made | {"model": str(tmp_path / "model")}))
    assert [trainer.ref_model is None for trainer in runs] == [False, True, True]
    assert [trainer._stored_reference._loaded is None for trainer in runs[1:]] == [False, True]
    for trainer in runs[1:]:
        assert_equal_logs(logged(trainer), logged(runs[0]))


def test_sharded_parameters_are_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The policy of now would stand in for the reference.
    monkeypatch.setattr(FusedDPOTrainer, "_is_sharded", lambda trainer: True)
    with pytest.raises(ValueError, match="ref_store works on one process and under DDP"):
        train(FusedDPOTrainer, tmp_path, **setup(ROWS, ref_store=tmp_path / "refs"))


def test_images_need_a_store_of_their_own_path(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"has images\. Pass ref_store"):
        train(FusedDPOTrainer, tmp_path, precompute_ref_log_probs=True, **setup(ROWS))


def test_a_digest_tells_content_mode_size_and_order_of_pictures() -> None:
    pixels = bytes(range(48))
    picture = Image.frombytes("RGB", (4, 4), pixels)
    others = [
        {"images": [Image.frombytes("RGB", (2, 8), pixels)]},
        {"images": [Image.frombytes("RGB", (4, 4), pixels[::-1])]},
        {"images": [Image.frombytes("L", (6, 8), pixels)]},
        {"images": [picture, picture]},
        {"image": np.frombuffer(pixels, np.uint8).reshape(4, 4, 3)},
        {"image": torch.zeros(3, 4, 4)},
        {"image": torch.zeros(3, 4, 4, dtype=torch.float64)},
    ]
    one = ids_of_images({"images": [picture]})
    assert (ids_of_images({"image": picture}) == one).all()
    seen = {tuple(ids_of_images(each)) for each in others} | {tuple(one)}
    assert len(seen) == len(others) + 1
    assert all(2**31 <= value < 2**31 + 2**16 for value in one)
    assert (ids_of_images({"image": None}) == -1).all()
    with pytest.raises(TypeError, match=r"got str\. Cast the column"):
        ids_of_images({"image": "cat.png"})
