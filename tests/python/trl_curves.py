"""Short trainings that must not depend on how many processes share the batch; used by
test_trl_distributed (one process) and trl_two_ranks."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.distributed as dist
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
    """What became of the trained parameters."""

    start: dict[str, Tensor]
    gradients: dict[str, Tensor]  # before the first step
    parameters: dict[str, Tensor]  # after the last
    logs: list[dict[str, float]]

    def assert_equal(self, want: Curve, what: str) -> None:
        assert self.gradients.keys() == want.gradients.keys() == want.parameters.keys()
        for name, gradient in want.gradients.items():
            off = (self.gradients[name] - gradient).abs().max() / gradient.abs().max()
            assert off <= EQUAL, f"{what}: gradient of {name} is off by {off}"
            off = (self.parameters[name] - want.parameters[name]).abs().max()
            assert off <= EQUAL, f"{what}: {name} is off by {off}"
            moved = (want.parameters[name] - want.start[name]).abs().max()
            assert moved >= MOVED, f"{what}: {name} has moved by {moved} only"


def whole(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def trained(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class BlankCollator(DataCollatorForPreference):  # type: ignore[misc]
    """Leaves no completion token in the pairs whose prompt begins with `MARK`."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        mark = make_tokenizer().convert_tokens_to_ids(MARK)
        batch["completion_mask"][batch["input_ids"][:, 0] == mark] = 0
        return batch


# Adam divides by the size of a gradient: an entry that is 0 but for rounding would move by the
# whole learning rate, whence the larger epsilon.
CURVES: dict[str, dict[str, Any]] = {
    "sgd": {"optim": "sgd", "learning_rate": 0.5},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-2, "adam_epsilon": 1e-4},
    "tied head": {"family": "llama tied", "optim": "sgd", "learning_rate": 0.5},
    "LoRA": {
        "optim": "sgd",
        "learning_rate": 0.5,
        "with_ref_model": False,
        # Random B, too: of a new one, A would have no gradient in the first step.
        "keywords": {
            "peft_config": peft.LoraConfig(
                r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False
            )
        },
    },
    "rank without completions": {
        "optim": "sgd",
        "learning_rate": 0.5,
        "keywords": {"data_collator": BlankCollator(pad_token_id=0)},
    },
}


def uneven_rows() -> list[dict[str, str]]:
    """Of four pairs in a batch the second rank gets the last two: longer, and marked."""
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
            self.gradients = {n: whole(p.grad) for n, p in trained(model).items()}


def curve_trainer(
    trainer_class: Any, folder: Any, name: str, pairs_per_rank: int, **options: Any
) -> Any:
    model = make_model(CURVES[name].get("family", "llama"), seed=1)  # not the reference's seed
    torch.manual_seed(5)  # of an adapter
    return make_trainer(
        trainer_class,
        folder,
        model=model,
        rows=uneven_rows(),
        per_device_train_batch_size=pairs_per_rank,
        max_steps=STEPS,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        ddp_timeout=60,
        **CURVES[name],
        **options,
    )


def curve(trainer_class: Any, folder: Any, name: str, pairs_per_rank: int) -> Curve:
    """Train in this process, or with all the ranks that it belongs to."""
    trainer = curve_trainer(trainer_class, folder, name, pairs_per_rank)
    assert trainer._shared_prompts.active
    start = {name: whole(p) for name, p in trained(trainer.model).items()}
    first = _FirstGradients()
    trainer.add_callback(first)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    end = {name: whole(p) for name, p in trained(model).items()}
    return Curve(start, first.gradients, end, logged(trainer))


def save_curve(result: Curve, folder: pathlib.Path, name: str) -> None:
    """Write it as name.pt, after a check that both ranks have the same."""
    for what, tensor in (result.gradients | result.parameters).items():
        others = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(others, tensor.contiguous())
        assert torch.equal(others[0], others[1]), f"{name}: ranks differ in {what}"
    if dist.get_rank() == 0:
        torch.save(result, folder / f"{name}.pt")
