"""In bf16 both trainers round, at other places. Over many seeds, ours must be as near to fp64 as
TRL's.

The model's layers round alike in both; what differs is the head, the sums over tokens and the loss.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from fusedpo.trl import FusedDPOTrainer
from torch import Tensor
from trl import DPOTrainer
from trl_helpers import (
    make_model,
    make_trainer,
    one_thread,  # noqa: F401  a fixture
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

SEEDS = range(20)
ALLOWED = 1.1  # times TRL's distance
BETA = 0.1


@pytest.fixture(scope="module", params=["bf16 weights", "fp32 weights under bf16 autocast"])
def distances(request: Any, tmp_path_factory: Any) -> dict[str, dict[str, float]]:
    """For each trainer: root mean square over seeds of the distance from fp64, by quantity."""
    dtype = torch.bfloat16 if request.param == "bf16 weights" else torch.float32
    squares: dict[str, dict[str, list[float]]] = {}
    exact: list[dict[str, Tensor]] = []
    for name, trainer_class in (("trl", DPOTrainer), ("fusedpo", FusedDPOTrainer)):
        trainer = make_trainer(
            trainer_class,
            tmp_path_factory.mktemp("run"),
            bf16=dtype == torch.float32,
            model=make_model().to(dtype),
            with_ref_model=False,
            keywords={"ref_model": make_model().to(dtype)},
        )
        assert name == "trl" or trainer._shared_prompts.active
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        squares[name] = {}
        for seed in SEEDS:
            set_parameters(trainer, seed)
            if name == "trl":
                exact.append(in_fp64(trainer, batch))
            got = of_trainer(trainer, batch)
            for what, value in got.items():
                off = (value.double() - exact[seed][what]).square().mean().item()
                squares[name].setdefault(what, []).append(off)
    return {
        name: {what: math.sqrt(sum(off) / len(off)) for what, off in by_quantity.items()}
        for name, by_quantity in squares.items()
    }


def set_parameters(trainer: Any, seed: int) -> None:
    """Reference of this seed, and a policy some nats away from it."""
    reference = make_model(seed=seed).state_dict()
    trainer.ref_model.load_state_dict(reference)
    generator = torch.Generator().manual_seed(1000 + seed)
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(reference[name] + 0.05 * noise)


def of_trainer(trainer: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    with trainer.compute_loss_context_manager():
        loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    logps = torch.tensor([metrics["logps/chosen"], metrics["logps/rejected"]])
    grads = [p.grad.flatten().double() for p in trainer.model.parameters()]
    return {"loss": loss.detach(), "logps": logps, "gradients": torch.cat(grads)}


def in_fp64(trainer: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The same parameters in fp64, through the models' own forward: no head of TRL's or ours."""
    mask = batch["completion_mask"][:, 1:]
    both = []
    models = (trainer.accelerator.unwrap_model(trainer.model), trainer.ref_model)
    for each in models:
        model = make_model().double().train(each.training)
        model.load_state_dict({name: value.double() for name, value in each.state_dict().items()})
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        tokens = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        both.append((model, (tokens * mask).sum(dim=1)))
    (policy, logps), (_, ref_logps) = both
    chosen, rejected = (logps - ref_logps.detach()).chunk(2)
    assert (chosen - rejected).abs().max() > 0.1
    loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    loss.backward()
    grads = [p.grad.flatten() for p in policy.parameters()]
    halves = torch.stack([half.mean() for half in logps.detach().chunk(2)])
    return {"loss": loss.detach(), "logps": halves, "gradients": torch.cat(grads)}


@pytest.mark.parametrize("quantity", ["loss", "logps", "gradients"])
def test_distance_from_fp64_is_at_most_trls(quantity: str, distances: Any) -> None:
    theirs, ours = distances["trl"][quantity], distances["fusedpo"][quantity]
    assert theirs > 0
    assert ours <= ALLOWED * theirs, f"{ours} and TRL's {theirs}"
