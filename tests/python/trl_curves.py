"""Short trainings that must not depend on how many processes share the batch; used by
test_trl_distributed (one process) and trl_two_ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_helpers import logged, make_model, make_pairs, make_tokenizer, make_trainer

STEPS = 3
EQUAL = 1e-5  # relative for gradients, absolute for parameters
MOVED = 100 * EQUAL  # at least, by every parameter
MARK = "road"


@dataclass
class Curve:
    gradients: dict[str, Tensor]  # before the first step
    parameters: dict[str, Tensor]  # after the last
    logs: list[dict[str, float]]

    def assert_equal(self, want: Curve, start: dict[str, Tensor], what: str) -> None:
        """`start`: the parameters before the first step."""
        assert self.gradients.keys() == want.gradients.keys() == want.parameters.keys()
        for name, gradient in want.gradients.items():
            off = (self.gradients[name] - gradient).abs().max() / gradient.abs().max()
            assert off <= EQUAL, f"{what}: gradient of {name} is off by {off}"
            off = (self.parameters[name] - want.parameters[name]).abs().max()
            assert off <= EQUAL, f"{what}: {name} is off by {off}"
            moved = (want.parameters[name] - start[name]).abs().max()
            assert moved >= MOVED, f"{what}: {name} has moved by {moved} only"


def whole(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


class BlankCollator(DataCollatorForPreference):  # type: ignore[misc]
    """Leaves no completion token in the pairs whose prompt begins with `MARK`."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        mark = make_tokenizer().convert_tokens_to_ids(MARK)
        batch["completion_mask"][batch["input_ids"][:, 0] == mark] = 0
        return batch


# Adam divides by the size of a gradient: an entry that is 0 but for rounding would move by the whole
# learning rate, whence the larger epsilon.
CURVES: dict[str, dict[str, Any]] = {
    "sgd": {"optim": "sgd", "learning_rate": 0.5},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-2, "adam_epsilon": 1e-4},
    "rank without completions": {
        "optim": "sgd",
        "learning_rate": 0.5,
        "keywords": {"data_collator": BlankCollator(pad_token_id=0)},
    },
}


def uneven_rows() -> list[dict[str, str]]:
    """Of four pairs in a batch the last two, which are the second rank's, are longer, and marked."""
    rows = make_pairs(4 * STEPS)
    for index, row in enumerate(rows):
        if index % 4 >= 2:
            row["prompt"] = f"{MARK} {row['prompt']}"
            row["chosen"], row["rejected"] = 3 * row["chosen"], 2 * row["rejected"]
    return rows


class _FirstGradients(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters()}


def curve(trainer_class: Any, folder: Any, name: str, pairs_per_rank: int) -> Curve:
    """Train in this process, or with all the ranks that it belongs to."""
    trainer = make_trainer(
        trainer_class,
        folder,
        model=make_model(seed=1),  # another than the reference
        rows=uneven_rows(),
        per_device_train_batch_size=pairs_per_rank,
        max_steps=STEPS,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        ddp_timeout=60,
        **CURVES[name],
    )
    first = _FirstGradients()
    trainer.add_callback(first)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    return Curve(first.gradients, parameters, logged(trainer))
