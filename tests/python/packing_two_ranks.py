"""What test_packing_distributed runs on each of two gloo ranks; argument: a folder."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher
from datasets import Dataset, IterableDataset
from fusedpo._head import add_fused_head
from fusedpo._packing.attention import use_packed_attention
from fusedpo.trl import FusedDPOTrainer
from packing_helpers import LENGTHS, make_groups, packed_logps, relative_difference, summed
from ranks import leave
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_helpers import logged, make_config, make_model, make_pairs, make_tokenizer


def build(*, checkpointing: bool = False) -> Any:
    model = make_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    add_fused_head(model)
    use_packed_attention(model)
    return model


def gradients(model: Any, seed: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    summed(packed_logps(model, make_groups(LENGTHS[seed:], seed))).sum().backward()
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
        for name, p in model.named_parameters()
    }


def fsdp2(rank: int) -> dict[str, float]:
    """How far gradients under FSDP2 are from the mean over ranks, relative."""
    plain = build()
    each = [gradients(plain, seed) for seed in range(2)]
    want = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
    differences = {}
    for name in ("plain", "checkpointing"):
        model = build(checkpointing=name == "checkpointing")
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        differences[name] = relative_difference(gradients(model, rank), want)
    return differences


def stream(folder: pathlib.Path, share_prompts: bool) -> Any:
    """Train on rows, evaluate on a stream: accelerate reads that on one rank for both."""
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = FusedDPOTrainer(
        make_model(),
        ref_model=make_model(),
        args=make_config(folder, per_device_train_batch_size=2, **options),
        train_dataset=Dataset.from_list(make_pairs()),
        eval_dataset=IterableDataset.from_generator(make_pairs),
        processing_class=make_tokenizer(),
        # Such batches are joined and cut again: they have to be of one length.
        data_collator=DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=32),
        share_prompts=share_prompts,
    )
    trainer.train()
    assert isinstance(trainer.get_eval_dataloader(), DataLoaderDispatcher)
    return trainer


def late_stream(folder: pathlib.Path, share_prompts: bool) -> Any:
    """Train without a data set to evaluate on; the stream comes later."""
    trainer = FusedDPOTrainer(
        make_model(),
        ref_model=make_model(),
        args=make_config(folder, per_device_train_batch_size=2, max_steps=1),
        train_dataset=Dataset.from_list(make_pairs()),
        processing_class=make_tokenizer(),
        data_collator=DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=32),
        share_prompts=share_prompts,
    )
    trainer.train()
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: row[name] for name in names} for row in trainer.train_dataset]
    trainer.evaluate(IterableDataset.from_generator(lambda: iter(rows)))
    predicted = trainer.predict(IterableDataset.from_generator(lambda: iter(rows)))
    trainer.log({"predicted_loss": predicted.metrics["test_loss"]})
    return trainer


def main(folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {"fsdp2": fsdp2(dist.get_rank()), "tokens": {}}
    for name in ("packed", "padded"):
        trainer = stream(folder, name == "packed")
        results[name] = logged(trainer)
        results["tokens"][name] = trainer.state.log_history[0]["tokens/computed"]
        trainer = late_stream(folder, name == "packed")
        results[f"late {name}"] = logged(trainer)
        told = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        results["tokens"][f"late {name}"] = told[0]["eval_tokens/computed"]
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
