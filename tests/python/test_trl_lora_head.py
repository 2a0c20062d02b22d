"""Training with LoRA on the language-model head, against a DPO loop written by hand on PEFT's own
forward: TRL refuses such a training, so it cannot be what is compared with."""

from __future__ import annotations

import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from datasets import Dataset
from fusedpo import precompute
from fusedpo._precompute.records import keys_of
from fusedpo.trl import FusedDPOTrainer
from fusedpo.trl.ref_batches import records_of_batch
from fusedpo.trl.versions import at_least
from precompute_helpers import contents, write_inputs
from test_trl_store import assert_equal
from trl import DPOTrainer
from trl.trainer.utils import use_adapter
from trl_helpers import (
    assert_equal_logs,
    logged,
    make_config,
    make_model,
    make_pairs,
    make_tokenizer,
    need_tied_adapters,
    one_thread,  # noqa: F401  a fixture
    train,
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

# Plain SGD, so that the size of a gradient shows in the parameters.
SGD: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 2.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 4,
}
BETA = 0.1


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    if "ensure_weight_tying" in options:
        need_tied_adapters()
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", *targets], **options)


def trained_before(config: peft.LoraConfig, family: str = "llama") -> Any:
    torch.manual_seed(3)
    model = peft.get_peft_model(make_model(family), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


SETUPS: dict[str, Any] = {
    "a new adapter": lambda: {"keywords": {"peft_config": lora("lm_head")}},
    "a new adapter on a tied head": lambda: {
        "family": "llama tied",
        "keywords": {"peft_config": lora("lm_head")},
    },
    "tied adapters on head and embedding": lambda: {
        "family": "llama tied",
        "keywords": {
            "peft_config": lora("embed_tokens", "lm_head", ensure_weight_tying=True),
        },
    },
    "rank-stabilised, under a softcap": lambda: {
        "family": "gemma2 softcap",
        "keywords": {"peft_config": lora("lm_head", use_rslora=True)},
    },
    "an adapter that was trained before": lambda: {"model": trained_before(lora("lm_head"))},
    "some rows of a tied head": lambda: {
        "family": "llama tied",
        "keywords": {"peft_config": lora(trainable_token_indices=[7, 11])},
    },
    "gradient checkpointing": lambda: {
        "gradient_checkpointing": True,
        "keywords": {"peft_config": lora("lm_head")},
    },
}


class Recording(FusedDPOTrainer):
    """Keeps every batch, and a copy of the model as the training found it."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.batches: list[dict[str, Tensor]] = []
        self.losses: list[float] = []  # logs may be rounded
        self.start = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        tensors = {n: value for n, value in inputs.items() if isinstance(value, Tensor)}
        self.batches.append({name: value.clone() for name, value in tensors.items()})
        loss = super()._compute_loss(model, inputs, return_outputs)
        self.losses.append(float(loss))
        return loss


def eager_logps(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probs of the chosen and rejected completions by PEFT's own forward and log_softmax."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    base = model.get_base_model()
    forward = type(base).forward  # the instance's own is the fused one
    logits = forward(base, ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
    token_logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    chosen, rejected = (token_logps * mask).sum(1).chunk(2)
    return chosen, rejected


def train_by_hand(trainer: Recording) -> tuple[list[float], dict[str, Tensor]]:
    """Repeat a training of `trainer` from its start, eagerly; return losses and parameters."""
    model = trainer.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(trainer.start[name])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=SGD["learning_rate"])
    losses = []
    for batch in trainer.batches:
        with torch.no_grad(), use_adapter(model, "ref" if "ref" in model.peft_config else None):
            ref_chosen, ref_rejected = eager_logps(model, batch)
        chosen, rejected = eager_logps(model, batch)
        margin = (chosen - ref_chosen) - (rejected - ref_rejected)
        loss = -F.logsigmoid(BETA * margin).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about tied weights
@pytest.mark.parametrize("setup", SETUPS)
def test_losses_and_parameters_equal_a_hand_written_loop(
    setup: str, tmp_path: pathlib.Path
) -> None:
    trainer = train(Recording, tmp_path, with_ref_model=False, **SETUPS[setup](), **SGD)
    got = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    losses = trainer.losses
    want_losses, want = train_by_hand(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # policy = reference at the start
    assert abs(losses[-1] - losses[0]) > 1e-2
    assert losses == pytest.approx(want_losses, rel=1e-5)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("lm_head.lora_" in name or "trainable_tokens" in name for name in trained)
    for name, parameter in got.items():
        moved = (want[name] - trainer.start[name]).abs().max()
        assert (moved > 1e-4) if name in trained else (moved == 0), name
        # Rounding errors grow over four steps of a large step size.
        assert (parameter - want[name]).abs().max() <= 1e-4 * moved, name


def test_every_logged_value_of_a_head_trained_as_a_whole_equals_trl(tmp_path: pathlib.Path) -> None:
    logs = []
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        options = {"peft_config": lora(modules_to_save=["lm_head"])}
        trainer = train(trainer_class, tmp_path, keywords=options, with_ref_model=False)
        logs.append(logged(trainer))
    assert_equal_logs(logs[1], logs[0])


def test_store_made_from_the_base_model_serves_a_training_with_a_new_adapter(
    tmp_path: pathlib.Path,
) -> None:
    inputs = write_inputs(tmp_path, rows=16)
    store = str(tmp_path / "refs")
    precompute(*inputs, store, dtype="float32", autocast="no")

    def run(**more: Any) -> Any:
        keywords = {"peft_config": lora("lm_head")} | more
        return train(FusedDPOTrainer, tmp_path, keywords=keywords, with_ref_model=False)

    assert_equal(run(ref_store=store, ref_miss="error"), logged(run()))


def test_precompute_scores_with_an_adapter_on_the_head(tmp_path: pathlib.Path) -> None:
    inputs = write_inputs(tmp_path, rows=8)
    model = trained_before(lora("lm_head"))
    model.save_pretrained(tmp_path / "adapter")
    store = str(tmp_path / "refs")
    precompute(
        *inputs, store, ref_adapter=str(tmp_path / "adapter"), dtype="float32", autocast="no"
    )
    trainer = train(
        Recording,
        tmp_path,
        rows=make_pairs(8),
        model=model,
        with_ref_model=False,
        keywords={"ref_store": store, "ref_miss": "error"},
        max_steps=1,
        learning_rate=0.0,
    )
    found = contents(store)
    for batch in trainer.batches:
        with torch.no_grad():
            want = torch.cat(eager_logps(model, batch))
        keys = keys_of(records_of_batch(batch))
        got = [found[key.tobytes()] for key in keys]
        assert got == pytest.approx(want.tolist(), rel=1e-5)


def test_what_is_not_low_rank_is_refused_at_construction(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"\(lm_head\) must be LoRA.*Dora.*modules_to_save"):
        FusedDPOTrainer(
            make_model(),
            args=make_config(tmp_path),
            train_dataset=Dataset.from_list(make_pairs()),
            processing_class=make_tokenizer(),
            peft_config=lora("lm_head", use_dora=True),
        )


@pytest.mark.skipif(at_least(1, 15), reason="TRL refuses adapters on the head since 1.15")
def test_every_logged_value_equals_that_of_a_trl_that_takes_the_adapter(
    tmp_path: pathlib.Path,
) -> None:
    logs = []
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        options = {"peft_config": lora("lm_head")}
        trainer = train(trainer_class, tmp_path, keywords=options, with_ref_model=False)
        logs.append(logged(trainer))
    assert_equal_logs(logs[1], logs[0])


@pytest.mark.skipif(not at_least(1, 15), reason="TRL takes adapters on the head before 1.15")
def test_trls_own_trainers_refuse_as_before(tmp_path: pathlib.Path) -> None:
    options = {"keywords": {"peft_config": lora("lm_head")}, "with_ref_model": False}
    train(FusedDPOTrainer, tmp_path, max_steps=1, **options)
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        train(DPOTrainer, tmp_path, **options)


@pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="this torch is built without gloo"
)
def test_fsdp2_gives_the_adapter_the_mean_of_the_gradients_of_all_ranks() -> None:
    script = pathlib.Path(__file__).with_name("trl_two_ranks_lora_head.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-6000:]
