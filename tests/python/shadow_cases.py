"""Two real trainings over the same steps, TRL's and ours, compared call by call and gradient by
gradient.

DPOTrainer trains first and is recorded. FusedDPOTrainer then trains on its own, except that each
loss is computed from the parameters that TRL had there: so the difference of one step is seen, not
what became of it. Gradients are read before the optimizer, which hides their scale, and unclipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fusedpo.trl import FusedDPOTrainer
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer
from trl_helpers import DPO_METRICS, make_trainer

LOSS_AND_METRICS = 1e-5  # relative
GRADIENTS = 1e-4  # of the largest entry of a parameter's gradient
# A gradient that is 0 but for rounding (of a key's bias) has the size of the others' errors.
NEGLIGIBLE = 1e-3


@dataclass
class Call:
    """One loss: of a micro-batch in training, or of a batch in evaluation."""

    mode: str
    batch: dict[str, Tensor]
    parameters: dict[str, Tensor]  # trained ones, before
    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    rewards: list[Tensor] = field(default_factory=list)  # [B] of chosen and rejected, TRL only


@dataclass
class Run:
    calls: list[Call] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # one dict for each step


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Moves the policy off the reference when training begins, then notes what happens."""

    def __init__(self, trainer: Any, noise: float, replayed: Run | None = None) -> None:
        self.trainer, self.noise, self.replayed, self.run = trainer, noise, replayed, Run()
        self._compute_loss = trainer._compute_loss
        trainer._compute_loss = self.compute_loss
        self._gather = trainer.accelerator.gather
        trainer.accelerator.gather = self.gather
        trainer.add_callback(self)

    def _trained(self) -> dict[str, Tensor]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        generator = torch.Generator().manual_seed(7)
        for parameter in self._trained().values():
            shift = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(self.noise * shift.to(parameter.dtype))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.run.gradients.append(
            {n: p.grad.clone() for n, p in self._trained().items() if p.grad is not None}
        )

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        parameters = self._trained()
        if self.replayed is not None:
            for name, value in self.replayed.calls[len(self.run.calls)].parameters.items():
                parameters[name].data.copy_(value)
        call = Call(
            "train" if model.training else "eval",
            {n: v.clone() for n, v in inputs.items() if torch.is_tensor(v)},
            {name: p.detach().clone() for name, p in parameters.items()},
        )
        self.run.calls.append(call)
        result = self._compute_loss(model, inputs, return_outputs)
        call.loss = (result[0] if return_outputs else result).item()
        metrics = self.trainer._metrics[call.mode]
        call.metrics = {
            name: values[-1]
            for name, values in metrics.items()
            if not name.startswith("tokens/")  # ours alone
        }
        return result

    def gather(self, values: Tensor) -> Tensor:
        # The first vectors over pairs that TRL gathers are the rewards.
        if values.ndim == 1 and len(self.run.calls[-1].rewards) < 2:
            self.run.calls[-1].rewards.append(values.detach())
        return self._gather(values)


def shadow(
    folder: Any,
    setup: Callable[[], dict[str, Any]] = dict,
    *,
    noise: float = 0.1,
    shares_prompts: bool = True,
    before_training: Callable[[Any], None] | None = None,
    **options: Any,
) -> tuple[Any, Run]:
    """Train with both trainers as `setup()` says (the arguments of `make_trainer`), for two steps.

    `shares_prompts` is what ours must have done to the end; `before_training` gets each trainer.

    Raises:
        AssertionError: names the worst difference, or says why the comparison would be empty.

    Returns:
        our trainer, and what TRL's run recorded.
    """
    runs: list[Run] = []
    trainers = []
    for name, trainer_class in (("trl", DPOTrainer), ("fusedpo", FusedDPOTrainer)):
        defaults = {"max_steps": 2, "optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0}
        arguments: dict[str, Any] = {**defaults, **setup(), **options}
        trainer = make_trainer(trainer_class, folder / name, **arguments)
        recorder = Recorder(trainer, noise, runs[0] if runs else None)
        if before_training is not None:
            before_training(trainer)
        trainer.train()
        trainers.append(trainer)
        runs.append(recorder.run)
    assert trainers[1]._shared_prompts.active is shares_prompts
    _assert_telling(trainers[0], runs[0])
    assert_equal_runs(runs[1], runs[0], trainers[0].beta)
    return trainers[1], runs[0]


def _assert_telling(trainer: Any, run: Run) -> None:
    """The comparison can fail: the policy is not the reference, V is no toy, softcap acts."""
    ratios = torch.cat([r.flatten() for call in run.calls for r in call.rewards]) / trainer.beta
    # A few of many random ones come close to 0.
    assert (ratios.abs() > 0.1).float().mean() > 0.8, f"policy and reference are close: {ratios}"
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert model.get_output_embeddings().weight.shape[0] >= 1000
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if softcap is not None:
        batch = run.calls[-1].batch
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        # Past its knee: |x| > c where c tanh(x / c) is left.
        assert logits.abs().max() > softcap * torch.tanh(torch.ones(()))


def assert_equal_runs(got: Run, want: Run, beta: float) -> None:
    assert [call.mode for call in got.calls] == [call.mode for call in want.calls]
    differences: list[tuple[float, str]] = []  # in units of what is allowed
    for index, (ours, theirs) in enumerate(zip(got.calls, want.calls, strict=True)):
        for name, value in theirs.batch.items():
            if not name.startswith("ref_"):  # precomputed: ours are in a store
                assert torch.equal(ours.batch[name], value), f"other batches: {name}"
        assert ours.metrics.keys() == theirs.metrics.keys() >= DPO_METRICS
        pairs = {"loss": (ours.loss, theirs.loss)}
        pairs |= {name: (ours.metrics[name], value) for name, value in theirs.metrics.items()}
        for name, (mine, value) in pairs.items():
            scale = max(abs(value), _scale(name, theirs.metrics, beta))
            difference = abs(mine - value) / (LOSS_AND_METRICS * scale)
            what = f"{theirs.mode} call {index}: {name} is {mine}, TRL has {value}"
            differences.append((difference, what))
    assert len(got.gradients) == len(want.gradients) > 0
    for step, (ours_all, theirs_all) in enumerate(zip(got.gradients, want.gradients, strict=True)):
        assert ours_all.keys() == theirs_all.keys()
        largest = max(grad.abs().max().item() for grad in theirs_all.values())
        assert largest > 0
        for name, grad in theirs_all.items():
            scale = max(grad.abs().max().item(), NEGLIGIBLE * largest)
            # TRL keeps adapters on quantised weights in bf16. That rounds what is equal, twice: the
            # gradient, and what it is a product of.
            allowed = max(GRADIENTS, 2 * torch.finfo(grad.dtype).eps)
            off = (ours_all[name] - grad).abs().max().item()
            what = f"step {step}: gradient of {name} is off by {off} of {scale}"
            differences.append((off / (allowed * scale), what))
    worst, what = max(differences)
    assert worst <= 1, f"{worst:.2g} times the tolerance: {what}"


def _scale(name: str, metrics: dict[str, float], beta: float) -> float:
    """What a difference is relative to, besides the value.

    A reward is a difference of log-probs, and no more exact than they are: two units in their last
    place. Logits of both signs are averaged.
    """
    if not name.startswith("rewards/"):
        return 0.1 if name.startswith("logits/") else 1e-6
    logps = max(abs(metrics["logps/chosen"]), abs(metrics["logps/rejected"]))
    return 2 * torch.finfo(torch.float32).eps * logps * beta / LOSS_AND_METRICS
