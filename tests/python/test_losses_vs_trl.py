"""Losses against the code of TRL's DPO, KTO, CPO and ORPO trainers on identical batches.

The policy is moved away from the reference first (every |r| > 0.1): where they are equal, most
mistakes would give equal numbers.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

import fusedpo
from datasets import Dataset
from fusedpo.trl import FusedDPOTrainer
from fusedpo.trl.versions import at_least
from trl import DPOTrainer
from trl_helpers import (
    make_config,
    make_model,
    make_pairs,
    make_tokenizer,
    one_thread,  # noqa: F401  a fixture
    train,
)

pytestmark = pytest.mark.trl

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
WITH_F = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm")
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
TRL_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


OFF: dict[str, Any] = {
    "beta": 0.1,
    "loss_weights": None,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "ld_alpha": None,
    "use_weighting": False,
}


def cases() -> list[dict[str, Any]]:
    """Every loss, and every option with every loss that uses it; then lists with weights."""
    rows: list[dict[str, Any]] = []
    for name in TRL_LOSSES:
        base: dict[str, Any] = {"loss_type": [name]}
        if name in SMOOTHED:
            rows.append(base | {"label_smoothing": 0.2})
        if name == "exo_pair":
            base["label_smoothing"] = 1e-3
        rows += [base, base | {"ld_alpha": 0.4, "beta": 0.3}]
        if name in WITH_F:
            rows += [base | {"f_divergence_type": f} for f in F_DIVERGENCES[1:]]
            rows.append(
                base | {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.3}
            )
        if name not in ("aot", "aot_unpaired", "hinge", "sft"):  # TRL crashes on the last two
            rows.append(base | {"use_weighting": True})
    rows += [
        {"loss_type": ["discopop"], "discopop_tau": 0.5},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["ipo", "aot"], "loss_weights": [0.5, -0.25]},
        {
            "loss_type": ["sigmoid_norm", "robust"],
            "label_smoothing": 0.1,
            "f_divergence_type": "js_divergence",
            "ld_alpha": 0.0,
            "use_weighting": True,
        },
    ]
    return rows


def name_of(case: dict[str, Any]) -> str:
    values = ("+".join(v) if key == "loss_type" else f"{key}={v}" for key, v in case.items())
    return " ".join(values)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: Any) -> tuple[Any, Any]:
    # use_weighting: so that the heads compute what the weights need.
    folder = tmp_path_factory.mktemp("trl")
    made = []
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        trainer = train(trainer_class, folder, max_steps=1, learning_rate=0.0, use_weighting=True)
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.06 * noise.to(parameter.dtype))
        made.append(trainer)
    return made[0], made[1]


def configure(trainer: Any, case: dict[str, Any]) -> None:
    # Not a new DPOConfig: making one resets the state that accelerate keeps for the process.
    config = copy.copy(trainer.args)
    for name, value in (OFF | case).items():
        setattr(config, name, value)
    trainer.loss_types = config.loss_type
    trainer.loss_weights = config.loss_weights or [1.0] * len(config.loss_type)
    for name in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef"):
        setattr(trainer, name, getattr(config, name))
    trainer.ld_alpha, trainer.use_weighting = config.ld_alpha, config.use_weighting
    trainer.args.discopop_tau = config.discopop_tau


def step(trainer: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, float], dict[str, Any]]:
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    loss.backward()
    metrics = {
        name: values[-1]
        for name, values in trainer._metrics["train"].items()
        if not name.startswith("tokens/")  # ours alone
    }
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    return loss.detach(), metrics, grads


def batch_of(trainer: Any, pairs: int) -> dict[str, Any]:
    # The training rows are tokenized already, and the same in both trainers.
    return trainer.data_collator([trainer.train_dataset[i] for i in range(pairs)])


def assert_same_step(got: Any, want: Any) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        assert got[1][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    largest = max(grad.abs().max().item() for grad in want[2].values())
    assert largest > 0
    for name, grad in want[2].items():
        assert (got[2][name] - grad).abs().max().item() <= 1e-4 * largest, name


@pytest.mark.parametrize("pairs", [2, 5])
@pytest.mark.parametrize("case", cases(), ids=name_of)
def test_loss_gradient_and_metrics_equal_trl(case, pairs, trainers):
    normalised = {"ipo", "sigmoid_norm"} & set(case["loss_type"])
    if normalised and "f_divergence_type" in case and not at_least(1, 13):
        pytest.skip("TRL 1.13 changed the f-divergences of length-normalised losses; ours are its")
    results = []
    for trainer in trainers:
        configure(trainer, case)
        results.append(step(trainer, batch_of(trainer, pairs)))
    theirs, ours = results
    assert_same_step(ours, theirs)
    assert abs(theirs[1]["rewards/chosen"]) > 0.1 * trainers[0].beta  # |r| > 0.1


def test_every_log_ratio_is_away_from_zero(trainers):
    for pairs in (2, 5):
        trainer = trainers[1]
        trainer.ld_alpha = None
        batch = batch_of(trainer, pairs)
        policy = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
        ref = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, batch))
        assert ((policy - ref).abs() > 0.1).all()


@pytest.mark.parametrize("name", ["hinge", "sft"])
def test_weighting_works_where_trl_crashes(name, trainers):
    theirs, ours = trainers
    case = {"loss_type": [name], "use_weighting": True}
    configure(theirs, case)
    with pytest.raises(RuntimeError):
        step(theirs, batch_of(theirs, 3))
    # The weights are those of any other loss: they follow from two losses that TRL can weight.
    batch = batch_of(ours, 3)
    losses = {}
    for weighting in (False, True):
        configure(ours, case | {"use_weighting": weighting})
        losses[weighting] = step(ours, batch)[0]
    assert 0 < losses[True] < losses[False]
    with torch.no_grad():
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        kept = {k: batch[k] for k in ("input_ids", "attention_mask")}
        out = ours.model(**kept, labels=labels, fused_lm_head=True)
        mask = batch["completion_mask"][:, 1:]
        mean = ((out.log_probs - out.log_sum_sq_probs) * mask).sum(1) / mask.sum(1)
        chosen, rejected = mean.exp().chunk(2)
        if name == "sft":
            losses_of_pairs = -out.log_probs[:3].sum() / mask[:3].sum()
        else:
            ref = torch.stack(ours.compute_ref_log_probs(ours.ref_model, batch))
            r = out.log_probs.sum(1).view(2, 3) - ref
            losses_of_pairs = (1 - 0.1 * (r[0] - r[1])).clamp(min=0)
    torch.testing.assert_close(losses[True], (chosen * rejected * losses_of_pairs).mean())


def test_empty_prompts_divide_by_trls_lengths(trainers):
    results = []
    for trainer in trainers:
        batch = batch_of(trainer, 3)
        # Without a prompt, the shifted mask loses the first completion token.
        batch["completion_mask"] = batch["attention_mask"].clone()
        configure(trainer, {"loss_type": ["ipo"]})
        results.append(step(trainer, batch))
    assert_same_step(results[1], results[0])


def test_training_with_a_list_of_losses_equals_trl(tmp_path):
    options = {
        "loss_type": ["sigmoid", "ipo", "sft"],
        "loss_weights": [0.7, 0.1, 0.5],
        "ld_alpha": 0.5,
        "precompute_ref_log_probs": True,  # the reference is weighted by ld_alpha, too
        "max_steps": 4,
    }
    logs = []
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        history = train(trainer_class, tmp_path, **options).state.log_history
        logs.append([entry["loss"] for entry in history if "loss" in entry])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def test_ignored_options_warn_once_by_name(tmp_path):
    ignored = {"label_smoothing": 0.1, "discopop_tau": 0.2, "f_alpha_divergence_coef": 0.3}
    with pytest.warns(UserWarning, match="fusedpo: DPOConfig has") as caught:
        trainer = train(FusedDPOTrainer, tmp_path, max_steps=2, **ignored)
    ours = [str(w.message) for w in caught if "fusedpo" in str(w.message)]
    assert len(ours) == 1
    assert all(f"{name}={value}" in ours[0] for name, value in ignored.items())
    assert not ignored.keys() & trainer._loss_call.keys()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fusedpo")
        train(FusedDPOTrainer, tmp_path, max_steps=1, loss_type="robust", label_smoothing=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, r"DPOConfig.loss_type must be among sigmoid, .*got 'dpo'"),
        ({"loss_type": "simpo"}, r"DPOConfig.loss_type must be among .*got 'simpo'"),
        ({"ld_alpha": 1.5}, r"DPOConfig.ld_alpha must be in \[0, 1\]"),
        ({"beta": -0.1}, "DPOConfig: beta must be > 0"),
        ({"loss_type": "exo_pair"}, "DPOConfig: label_smoothing must be in"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "DPOConfig: label_smoothing must be in"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "DPOConfig: discopop_tau must be > 0"),
        ({"loss_type": "aot", "use_weighting": True}, "DPOConfig.use_weighting must be False"),
        (
            {"loss_type": "nca_pair", "f_divergence_type": "forward_kl"},
            "DPOConfig: f_divergence_type must be left at 'reverse_kl' with loss_type 'nca_pair'",
        ),
    ],
)
def test_wrong_options_are_refused_at_construction(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(FusedDPOTrainer, tmp_path, **options)


# ---- losses without reference, and unpaired losses ----------------------------------------------


class Stub:
    """The attributes that a trainer's loss function reads."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)
        self.accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()


def experimental(module: str, name: str) -> Any:
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"trl.experimental.{module}"), name)


@pytest.mark.parametrize("pairs", [2, 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("ours", "theirs", "alpha"),
    [
        ("cpo", "sigmoid", 0.0),
        ("cpo_hinge", "hinge", 0.0),
        ("cpo_ipo", "ipo", 0.0),
        ("simpo", "simpo", 0.0),
        ("alphapo", "simpo", 0.25),
        ("alphapo", "simpo", -0.5),
    ],
)
def test_losses_without_reference_equal_trls_cpo_trainer(ours, theirs, alpha, smoothing, pairs):
    logps = [(-torch.rand(pairs) * 40 - 1).requires_grad_() for _ in range(2)]
    lengths = [torch.randint(3, 9, (pairs,)) for _ in range(2)]
    nll = torch.rand((), requires_grad=True)
    needs = fusedpo.loss_types()[ours]
    if smoothing and "label_smoothing" not in needs.options:
        return  # the same case as without smoothing
    averaged = "chosen_lengths" in needs.needs
    trainer = Stub(
        loss_type=theirs, beta=1.5, label_smoothing=smoothing, simpo_gamma=0.7, alpha=alpha
    )
    seen = [x / n if averaged else x for x, n in zip(logps, lengths, strict=True)]
    losses, chosen_rewards, rejected_rewards = experimental("cpo", "CPOTrainer").cpo_loss(
        trainer, *seen
    )
    want = losses.mean() + 0.3 * nll  # as in get_batch_loss_metrics, cpo_alpha = 0.3
    options: dict[str, Any] = {"loss_type": ours, "beta": 1.5, "cpo_alpha": 0.3}
    if "label_smoothing" in needs.options:
        options["label_smoothing"] = smoothing
    if "simpo_gamma" in needs.options:
        options["simpo_gamma"] = 0.7
    if ours == "alphapo":
        options["alpha"] = alpha
    got = fusedpo.preference_loss(
        *logps, chosen_lengths=lengths[0], rejected_lengths=lengths[1], chosen_nll=nll, **options
    )
    torch.testing.assert_close(got.loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.chosen_rewards, chosen_rewards, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.rejected_rewards, rejected_rewards, rtol=1e-5, atol=1e-6)
    grads = (torch.autograd.grad(loss, [*logps, nll]) for loss in (got.loss, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pairs", [2, 5])
def test_orpo_equals_trls_orpo_trainer(pairs):
    logps = [(-torch.rand(pairs) * 40 - 1).requires_grad_() for _ in range(2)]
    lengths = [torch.randint(3, 9, (pairs,)) for _ in range(2)]
    nll = torch.rand((), requires_grad=True)
    seen = [x / n for x, n in zip(logps, lengths, strict=True)]
    losses, chosen_rewards, rejected_rewards, *_ = experimental(
        "orpo", "ORPOTrainer"
    ).odds_ratio_loss(Stub(beta=0.2), *seen)
    want = nll - losses.mean()  # as in get_batch_loss_metrics
    got = fusedpo.preference_loss(
        *logps,
        loss_type="orpo",
        beta=0.2,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        chosen_nll=nll,
    )
    torch.testing.assert_close(got.loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.chosen_rewards, chosen_rewards)
    torch.testing.assert_close(got.rejected_rewards, rejected_rewards)
    grads = (torch.autograd.grad(loss, [*logps, nll]) for loss in (got.loss, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def kto_trainer(tmp_path_factory: Any) -> Any:
    if not at_least(1, 15):
        pytest.skip("KTOTrainer has the fused head, which this test scores with, since TRL 1.15")
    from trl import KTOConfig, KTOTrainer

    config = make_config(tmp_path_factory.mktemp("kto"))
    names = ("output_dir", "bf16", "use_cpu", "report_to", "per_device_train_batch_size")
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in make_pairs(8)
        for side in ("chosen", "rejected")
    ]
    trainer = KTOTrainer(
        make_model(),
        ref_model=make_model(),
        args=KTOConfig(
            **{name: getattr(config, name) for name in names},
            desirable_weight=1.5,
            undesirable_weight=0.75,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return trainer


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 5], [0, 2], [1, 3, 5]], ids=["mixed", "good", "bad"])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_unpaired_losses_equal_trls_kto_trainer(name, rows, kto_trainer):
    trainer = kto_trainer
    trainer.loss_type, trainer.calculate_KL = name, name == "kto"
    samples = [trainer.train_dataset[i] for i in rows]
    batch = trainer.data_collator(samples)
    trainer.model.train()
    trainer._metrics["train"].clear()
    want = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    trainer.model.zero_grad()
    want.backward()
    want_grads = [p.grad.clone() for p in trainer.model.parameters()]
    metrics = trainer._metrics["train"]

    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    kept = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logps = trainer.model(**kept, labels=labels, fused_lm_head=True).log_probs.sum(1)
    with torch.no_grad():
        ref = trainer.ref_model(**kept, labels=labels, fused_lm_head=True).log_probs.sum(1)
    assert ((logps - ref).abs() > 0.1).all()
    got = fusedpo.unpaired_loss(
        logps,
        ref,
        torch.as_tensor(batch["label"], dtype=torch.bool),
        loss_type=name,
        beta=trainer.beta,
        kl=metrics["kl"][-1] if name == "kto" else None,
        desirable_weight=1.5,
        undesirable_weight=0.75,
    )
    torch.testing.assert_close(got.loss, want, rtol=1e-5, atol=1e-6)
    good = torch.as_tensor(batch["label"], dtype=torch.bool)
    for side, mask in (("chosen", good), ("rejected", ~good)):
        if mask.any():
            mean = got.rewards[mask].mean().item()
            assert metrics[f"rewards/{side}"][-1] == pytest.approx(mean, rel=1e-5)
    trainer.model.zero_grad()
    got.loss.backward()
    for parameter, grad in zip(trainer.model.parameters(), want_grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-6)
