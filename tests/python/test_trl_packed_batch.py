"""Between collator and model: the packed row of a batch is that of its tensors, or is made anew."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

import fusedpo.trl.packed_batch as packed_batch_module
import fusedpo.trl.shared_prompt as shared_prompt_module
from accelerate.utils import send_to_device
from datasets import IterableDataset
from fusedpo._head import FusedHeadOutput
from fusedpo.trl import FusedDPOTrainer
from fusedpo.trl.packed_batch import KEY, CollatedBatch, PackingCollator, pack_batch, packed_row
from test_trl_shared_prompt import batch_of, build, left_padded, tokens
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import BatchEncoding
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_helpers import (
    assert_equal_logs,
    logged,
    make_model,
    make_pairs,
    one_thread,  # noqa: F401  a fixture
    train,
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]


# What a user may do to a batch --------------------------------------------------------------------


def other_ids(batch: Any) -> Any:
    ids = batch["input_ids"]
    batch["input_ids"] = torch.where(batch["completion_mask"] == 1, (ids + 1) % 32, ids)
    return batch


def other_ids_in_place(batch: Any) -> Any:
    batch["input_ids"][:, 1] = (batch["input_ids"][:, 1] + 1) % 32
    return batch


def wider_mask(batch: Any) -> Any:
    """The last token of each prompt is scored, too."""
    mask = batch["completion_mask"]
    batch["completion_mask"] = (mask | mask.roll(-1, dims=1)) & batch["attention_mask"]
    return batch


def fewer_pairs(batch: Any) -> Any:
    """Two pairs of each batch, in a new dict."""
    return {
        name: value.unflatten(0, (2, -1))[:, :2].flatten(0, 1)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    }


CHANGES = [other_ids, other_ids_in_place, wider_mask, fewer_pairs]


def assert_both_layouts_agree(run: Callable[[bool], Any]) -> None:
    packed, padded = run(True), run(False)
    assert_equal_logs(logged(packed), logged(padded))
    assert all(computed < whole for computed, whole in tokens(packed))


@pytest.mark.parametrize("change", CHANGES)
def test_collator_that_is_put_around_the_trainers_is_heeded(change: Any, tmp_path: Any) -> None:
    def run(share: bool) -> Any:
        trainer = build(tmp_path, ref_model=make_model(), share_prompts=share, max_steps=2)
        inner = trainer.data_collator
        trainer.data_collator = lambda examples: change(inner(examples))
        trainer.train()
        return trainer

    assert_both_layouts_agree(run)


@pytest.mark.parametrize("method", ["_prepare_inputs", "_prepare_input", "training_step"])
@pytest.mark.parametrize("change", CHANGES)
def test_subclass_that_changes_batches_as_they_are_prepared_is_heeded(
    change: Any, method: str, tmp_path: Any
) -> None:
    def before_preparing(self: Any, inputs: Any) -> Any:
        return super(changing, self)._prepare_inputs(change(inputs))

    def while_preparing(self: Any, data: Any) -> Any:
        data = super(changing, self)._prepare_input(data)
        return change(data) if isinstance(data, Mapping) else data

    def before_a_step(self: Any, model: Any, inputs: Any, *rest: Any, **keywords: Any) -> Any:
        return super(changing, self).training_step(model, change(inputs), *rest, **keywords)

    overrides = {
        "_prepare_inputs": before_preparing,
        "_prepare_input": while_preparing,
        "training_step": before_a_step,
    }
    changing = type("Changing", (FusedDPOTrainer,), {method: overrides[method]})

    def run(share: bool) -> Any:
        return train(changing, tmp_path, keywords={"share_prompts": share}, max_steps=2)

    assert_both_layouts_agree(run)


class Changed:
    """A loader that changes what another one gives."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        return map(other_ids, self.loader)


def test_loader_that_is_wrapped_is_heeded(tmp_path: Any) -> None:
    class Changing(FusedDPOTrainer):
        def get_eval_dataloader(self, *arguments: Any, **keywords: Any) -> Any:
            return Changed(super().get_eval_dataloader(*arguments, **keywords))

    def run(share: bool) -> Any:
        keywords = {"share_prompts": share}
        options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
        return train(Changing, tmp_path, keywords=keywords, eval_rows=make_pairs(6), **options)

    assert_both_layouts_agree(run)


@pytest.mark.parametrize("on_the_left", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_what_is_scored_goes_back_to_the_place_of_its_token(seed: int, on_the_left: bool) -> None:
    numbers = np.random.default_rng(seed)

    def ids(most: int) -> list[int]:
        tokens: list[int] = numbers.integers(5, 90, numbers.integers(0, most + 1)).tolist()
        return tokens

    pairs = [(ids(6), ids(4), ids(4)) for _ in range(numbers.integers(1, 5))]
    pairs.append(([7], [8], [9, 10]))  # one at least has a token
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    multiple = 8 if seed % 2 else None
    collator = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=multiple)
    batch = collator([dict(zip(names, each, strict=True)) for each in pairs])
    if on_the_left:
        batch = left_padded(batch)
    # The token itself is the result.
    want = torch.where(batch["completion_mask"] == 1, batch["input_ids"], 0)
    for row, attention in enumerate(batch["attention_mask"]):
        first = int(attention.argmax())  # of an empty row 0, where nothing is scored anyway
        if batch["completion_mask"][row, first]:
            want[row, first] = 0  # without a prompt nothing scores it

    row = pack_batch(batch)
    values = row.packed.labels.flatten().double()
    assert len(values) == len(row.places) == len(row.packed.rows)
    got = row.padded(FusedHeadOutput(log_probs=values)).log_probs
    assert got is not None
    assert torch.equal(got, want[:, 1:].double())


# How often, and where, it is laid out -------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_that_nobody_changes_is_laid_out_where_it_is_collated(
    workers: int, tmp_path: Any, monkeypatch: Any
) -> None:
    def not_here(inputs: Any) -> Any:
        raise AssertionError("laid out when it arrived")

    monkeypatch.setattr(shared_prompt_module, "pack_batch", not_here)
    trainer = train(
        FusedDPOTrainer,
        tmp_path,
        eval_rows=make_pairs(6, seed=1),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
        gradient_accumulation_steps=2,
        dataloader_num_workers=workers,
    )
    assert all(computed < padded for computed, padded in tokens(trainer))
    assert KEY not in batch_of(trainer)  # the trainer's collator is TRL's own


def test_store_is_covered_without_laying_out_batches(tmp_path: Any, monkeypatch: Any) -> None:
    def not_here(inputs: Any) -> Any:
        raise AssertionError("laid out for its token ids")

    monkeypatch.setattr(packed_batch_module, "pack_batch", not_here)
    trainer = build(tmp_path, ref_store=tmp_path / "refs", share_prompts=True)
    assert trainer._shared_prompts.active


def test_stream_that_evaluate_is_given_later_is_packed(tmp_path: Any) -> None:
    trainers = []
    for share in (True, False):
        trainer = build(tmp_path, ref_model=make_model(), share_prompts=share, max_steps=1)
        trainer.train()
        rows = [
            {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
            for row in trainer.train_dataset
        ]
        trainer.evaluate(IterableDataset.from_generator(lambda rows=rows: iter(rows)))
        trainers.append(trainer)
    assert_equal_logs(logged(trainers[0]), logged(trainers[1]))
    told = trainers[0].state.log_history[-1]
    assert told["eval_tokens/computed"] < told["eval_tokens/padded"]


# The way ------------------------------------------------------------------------------------------


def collated() -> CollatedBatch:
    examples = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10, 11]},
    ]
    batch = PackingCollator(DataCollatorForPreference(pad_token_id=0))(examples)
    assert isinstance(batch, CollatedBatch)
    return batch


WAYS: dict[str, Callable[[Any], Any]] = {
    "accelerate's transfer": lambda batch: send_to_device(batch, torch.device("meta")),
    "torch's pinning": pin_memory,
    "a worker's pickle": lambda batch: pickle.loads(pickle.dumps(batch)),
}


@pytest.mark.parametrize("way", WAYS)
def test_row_goes_with_its_tensors(way: str, monkeypatch: Any) -> None:
    # Without an accelerator there is no pinned memory.
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    before = collated()
    after = WAYS[way](before)
    row = packed_row(after)
    assert row is not None
    assert not row.is_of(before)
    assert row.places is not before[KEY].places
    assert row.places.device == row.packed.labels.device == after["input_ids"].device
    assert row.packed.segments == before[KEY].packed.segments
    assert after["input_ids"] is not before["input_ids"]


@pytest.mark.parametrize("way", WAYS)
def test_row_of_other_tensors_stays_behind(way: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    batch = collated()
    batch["completion_mask"] = batch["completion_mask"].clone()
    after = WAYS[way](batch)
    assert KEY not in after
    assert after["completion_mask"].shape == batch["completion_mask"].shape


def test_batch_of_another_type_stays_of_it(tmp_path: Any) -> None:
    def encode(examples: Any) -> BatchEncoding:
        return BatchEncoding(DataCollatorForPreference(pad_token_id=0)(examples))

    options = {"data_collator": encode, "share_prompts": True, "max_steps": 1}
    trainer = build(tmp_path, ref_model=make_model(), **options)
    assert isinstance(next(iter(trainer.get_train_dataloader())), BatchEncoding)
    trainer.train()
    assert all(computed < padded for computed, padded in tokens(trainer))


def test_tensors_that_come_and_go_do_not_pass_for_those_of_the_row(tmp_path: Any) -> None:
    trainer = build(tmp_path, ref_model=make_model())
    batch = batch_of(trainer)
    batch["input_ids"] = batch["input_ids"].clone()  # never written to, as those that follow
    trainer.token_logps(trainer.model, batch)
    address = id(batch["input_ids"])
    for _ in range(100):
        # The first is freed here, and Python gives its address to one of the next.
        batch["input_ids"] = batch["input_ids"].roll(1, dims=0)
        if id(batch["input_ids"]) == address:
            break
    got = trainer.token_logps(trainer.model, batch)
    trainer._shared_prompts.active = False
    want = trainer.token_logps(trainer.model, batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
