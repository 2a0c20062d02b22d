"""What test_generation_callback runs on two gloo ranks; arguments: a folder, and "add" or not."""

from __future__ import annotations

import json
import pathlib
import sys

import torch.distributed as dist
from fusedpo.tools.generation_callback import GenerationCallback
from fusedpo.trl import FusedDPOTrainer
from ranks import leave
from trl_helpers import logged, make_pairs, make_trainer

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    trainer = make_trainer(
        FusedDPOTrainer,
        folder,
        eval_rows=make_pairs(4),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
    )
    if sys.argv[2] == "add":
        prompts = [row["prompt"] for row in make_pairs(3)]
        trainer.add_callback(GenerationCallback(trainer, prompts, max_new_tokens=8))
    trainer.train()
    if dist.get_rank() == 0:
        (folder / "log.json").write_text(json.dumps(logged(trainer)), encoding="utf-8")
    dist.barrier()
    leave()
