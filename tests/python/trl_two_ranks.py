"""What test_trl_distributed runs on each of two gloo ranks; arguments: ddp, store or fsdp2, a
folder."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import torch
import torch.distributed as dist

torch.set_num_threads(1)


def ddp(folder: pathlib.Path) -> None:
    """Train with both trainers under DDP, write what rank 0 logs, compare parameters over ranks."""
    from fusedpo.trl import FusedDPOTrainer
    from trl import DPOTrainer
    from trl_helpers import logged, make_pairs, train

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
        for parameter in trainer.model.parameters():
            others = [torch.empty_like(parameter.data) for _ in range(2)]
            dist.all_gather(others, parameter.data)
            assert torch.equal(others[0], others[1]), "ranks hold different parameters"
    if dist.get_rank() == 0:
        (folder / "logs.json").write_text(json.dumps(logs), encoding="utf-8")


def store(folder: pathlib.Path) -> None:
    """Train under DDP without and with a store, twice; write what rank 0 logs."""
    from fusedpo import RefStore
    from fusedpo.trl import FusedDPOTrainer
    from trl_helpers import logged, make_pairs, train

    logs = {}
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
    if dist.get_rank() == 0:
        files = RefStore(folder / "refs").files()
        logs["records in logs"] = [file.records for file in files]
        logs["records"] = len(RefStore(folder / "refs"))
        (folder / "logs.json").write_text(json.dumps(logs), encoding="utf-8")


def fsdp2(folder: pathlib.Path) -> None:
    """The gradient of a head that is an FSDP2 unit of its own is the mean over ranks."""
    from fusedpo._head import add_fused_head
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from trl_helpers import make_model

    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def gradient(model: Any, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 90, (2, 9), generator=generator)
        model.zero_grad()
        out = model(ids, labels=ids, fused_lm_head=True)
        out.log_probs.sum().backward()
        grad = model.get_output_embeddings().weight.grad
        return grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()

    plain = make_model()
    add_fused_head(plain)
    want = (gradient(plain, 0) + gradient(plain, 1)) / 2
    model = make_model()
    add_fused_head(model)
    fully_shard(model.get_output_embeddings())
    fully_shard(model)
    got = gradient(model, rank)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if rank == 0:
        (folder / "logs.json").write_text("{}", encoding="utf-8")


if __name__ == "__main__":
    {"ddp": ddp, "store": store, "fsdp2": fsdp2}[sys.argv[1]](pathlib.Path(sys.argv[2]))
    dist.destroy_process_group()
