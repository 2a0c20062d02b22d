"""What test_trl_distributed runs on each of two gloo ranks.

Arguments: a folder, and the names of the checks. Of each check that has passed there is a name.json
then.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from fusedpo import RefStore
from fusedpo._head import add_fused_head
from fusedpo._packing.attention import use_packed_attention
from fusedpo._packing.layout import pack
from fusedpo.trl import FusedDPOTrainer
from packing_helpers import make_groups
from ranks import leave
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_curves import (
    CURVES,
    STEPS,
    BlankCollator,
    Curve,
    curve,
    save_curve,
    trained,
    uneven_rows,
    whole,
)
from trl_helpers import logged, make_model, make_pairs, make_trainer, train
from trl_zero import zero2, zero3  # noqa: F401  checks, too


def ddp_logs(folder: pathlib.Path) -> Any:
    """What both trainers log under DDP."""
    logs = {}
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        trainer = train(
            trainer_class,
            folder,
            per_device_train_batch_size=2,
            # 7 evaluation pairs on 2 ranks of 2: the last batch repeats a pair, which counts in the
            # rewards; the token metrics of a whole rank can be dropped.
            eval_rows=make_pairs(7, seed=1),
            per_device_eval_batch_size=2,
            eval_strategy="steps",
            eval_steps=3,
            ddp_find_unused_parameters=False,
        )
        logs[trainer_class.__name__] = logged(trainer)
    return logs


def store(folder: pathlib.Path) -> Any:
    """What is logged under DDP without and with a store, twice."""
    logs: dict[str, Any] = {}
    for name in ("online", "first", "second"):
        trainer = train(
            FusedDPOTrainer,
            folder,
            per_device_train_batch_size=2,
            eval_rows=make_pairs(7, seed=1),
            per_device_eval_batch_size=2,
            eval_strategy="steps",
            eval_steps=3,
            ddp_find_unused_parameters=False,
            with_ref_model=name == "online",
            keywords={} if name == "online" else {"ref_store": folder / "refs"},
        )
        logs[name] = logged(trainer)
    logs["records in logs"] = [file.records for file in RefStore(folder / "refs").files()]
    logs["records"] = len(RefStore(folder / "refs"))
    return logs


def ddp(folder: pathlib.Path) -> Any:
    """Train as `CURVES` says; both ranks must end with equal gradients and parameters."""
    for name in CURVES:
        save_curve(curve(FusedDPOTrainer, folder, name, pairs_per_rank=2), folder, name)
    return list(CURVES)


def resume(folder: pathlib.Path) -> Any:
    """The logs of four steps, and of a run that goes on from the checkpoint after the second."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "ddp_find_unused_parameters": False,
    }
    straight = train(FusedDPOTrainer, folder / "run", **options)
    resumed = make_trainer(FusedDPOTrainer, folder / "run", **options)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    return {"straight": logged(straight), "resumed": logged(resumed)}


# ---- FSDP2, which accelerate does not enable on a CPU: fully_shard by hand ----------------------


def _root_alone(model: Any) -> None:
    fully_shard(model)


def _layers_and_root(model: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=True)


def _head_alone(model: Any) -> None:
    fully_shard(model.lm_head)
    fully_shard(model)


def _as_accelerate_does(model: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    tail = [model.model.norm, model.lm_head]
    if model.lm_head.weight is model.model.embed_tokens.weight:
        tail.insert(1, model.model.embed_tokens)
    else:
        fully_shard(model.model.embed_tokens)
    fully_shard(tail, reshard_after_forward=False)
    fully_shard(model)


SHARDINGS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "root": ("llama", _root_alone),
    "layers": ("llama", _layers_and_root),
    "head": ("llama", _head_alone),
    "accelerate": ("llama", _as_accelerate_does),
    "root, tied": ("llama tied", _root_alone),
    "accelerate, tied": ("llama tied", _as_accelerate_does),
    "head with bias": ("phi head with bias", _head_alone),
}


def fsdp2(folder: pathlib.Path) -> Any:
    """Gradients and parameters of each sharding equal those of whole batches in one process."""
    for name, (family, shard) in SHARDINGS.items():
        for optimizer in (torch.optim.SGD, torch.optim.AdamW):
            blank = optimizer is torch.optim.SGD  # the second rank has no completion token
            single = make_trainer(FusedDPOTrainer, folder, **_setup(family, blank))
            sharded = make_trainer(FusedDPOTrainer, folder, **_setup(family, blank))
            shard(sharded.model)
            want = _steps(single, optimizer, range(4))
            mine = range(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
            got = _steps(sharded, optimizer, mine)
            got.assert_equal(want, f"{name}, {optimizer.__name__}")
    return list(SHARDINGS)


def _setup(family: str, blank: bool) -> dict[str, Any]:
    collator = BlankCollator if blank else DataCollatorForPreference
    return {
        "family": family,
        "model": make_model(family, seed=1),
        "rows": uneven_rows(),
        "keywords": {"data_collator": collator(pad_token_id=0)},
    }


def _steps(trainer: Any, optimizer_class: Any, rows: range) -> Curve:
    """Train on `rows` of every four pairs."""
    options = {"lr": 0.5} if optimizer_class is torch.optim.SGD else {"lr": 1e-2, "eps": 1e-4}
    assert trainer._shared_prompts.active
    optimizer = optimizer_class(trainer.model.parameters(), **options)
    start = {name: whole(p) for name, p in trained(trainer.model).items()}
    gradients: dict[str, Tensor] = {}
    trainer.model.train()
    for step in range(STEPS):
        batch = trainer.data_collator([trainer.train_dataset[4 * step + i] for i in rows])
        optimizer.zero_grad()
        trainer._compute_loss(trainer.model, batch, return_outputs=False).backward()
        if step == 0:
            gradients = {name: whole(p.grad) for name, p in trained(trainer.model).items()}
        optimizer.step()
    end = {name: whole(p) for name, p in trained(trainer.model).items()}
    return Curve(start, gradients, end, [])


# ---- tensor parallelism -------------------------------------------------------------------------


def tensor_parallel(folder: pathlib.Path) -> Any:
    """The head of a model that transformers has split over ranks gives the whole gradients."""
    families = ("qwen3", "qwen3 tied")
    for family in families:
        if dist.get_rank() == 0:
            make_model(family).save_pretrained(folder / family)
        dist.barrier()
        split = AutoModelForCausalLM.from_pretrained(folder / family, tp_plan="auto")
        assert isinstance(split.lm_head.weight, DTensor)
        outputs, models = [], (split, make_model(family))
        for model in models:
            add_fused_head(model)
            ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
            padded = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
            use_packed_attention(model)
            packed = model(packed=pack(make_groups()), fused_lm_head=True).log_probs
            output = torch.cat([padded.flatten(), packed])
            output.sum().backward()
            outputs.append(output)
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
        wanted = {name: p.grad for name, p in trained(models[1]).items()}
        for name, parameter in trained(split).items():
            got, want = whole(parameter.grad), wanted[name]
            assert (got - want).abs().max() <= 1e-4 * want.abs().max(), f"{family}: {name}"
    return families


if __name__ == "__main__":
    torch.set_num_threads(1)
    directory = pathlib.Path(sys.argv[1])
    PartialState(cpu=True)
    assert dist.get_world_size() == 2
    for check in sys.argv[2:]:
        folder_of_check = directory / check
        result_of_check = globals()[check](folder_of_check)
        if dist.get_rank() == 0:
            text = json.dumps(result_of_check)
            (directory / f"{check}.json").write_text(text, encoding="utf-8")
    leave()
