"""FusedDPOTrainer: what it logs, evaluates, refuses and calls, against DPOTrainer."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

import accelerate
import fusedpo._head as head_module
import fusedpo.trl.metrics as metrics_module
import fusedpo.trl.trainer as trainer_module
import peft
import transformers
import trl.trainer.dpo_trainer as trl_dpo
from datasets import Dataset
from fusedpo.trl import FusedDPOTrainer
from fusedpo.trl.bindings import replaced_names
from fusedpo.trl.versions import at_least
from torch.utils._python_dispatch import TorchDispatchMode
from trl import DPOTrainer
from trl_helpers import (
    DPO_METRICS,
    assert_equal_logs,
    logged,
    make_config,
    make_model,
    make_pairs,
    make_tokenizer,
    make_trainer,
    one_thread,  # noqa: F401  a fixture
    train,
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

# What a trainer logs: averages over micro-batches, and what an evaluation adds. How each step is
# computed, in many more setups, is compared in test_trl_shadow.
SETUPS: dict[str, Any] = {
    "full fine-tuning": dict,
    "logging every other step": lambda: {"logging_steps": 2},
    "uneven batches": lambda: {
        "rows": make_pairs(10),
        "eval_rows": make_pairs(6, seed=1),
        "eval_strategy": "epoch",
    },
    "gradient accumulation": lambda: {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
    "prompt tuning": lambda: {
        "keywords": {
            "peft_config": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        },
        "with_ref_model": False,
    },
    "mixture of experts": lambda: {"family": "mixtral", "router_aux_loss_coef": 0.5},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_every_logged_value_equals_trl(setup: str, tmp_path: Any) -> None:
    if setup == "prompt tuning" and not at_least(1, 15):
        pytest.skip("TRL before 1.15 fails on virtual tokens; FusedDPOTrainer is tested below")
    theirs = logged(train(DPOTrainer, tmp_path / "trl", **SETUPS[setup]()))
    ours = logged(train(FusedDPOTrainer, tmp_path / "fusedpo", **SETUPS[setup]()))
    assert theirs[0].keys() >= DPO_METRICS | {"loss", "grad_norm"}
    assert_equal_logs(ours, theirs)
    losses = [entry["loss"] for entry in theirs if "loss" in entry]
    assert max(losses) - min(losses) > 1e-3  # it does train


def test_virtual_tokens_are_scored_and_left_out_on_every_trl(tmp_path: Any) -> None:
    tuning = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    trainer = train(
        FusedDPOTrainer,
        tmp_path,
        keywords={"peft_config": tuning},
        with_ref_model=False,
        max_steps=2,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    ids, completion = batch["input_ids"], batch["completion_mask"]
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        got = trainer.token_logps(trainer.model, batch)
    assert logits.shape[1] == ids.shape[1] + 3
    want = logits[:, 3:-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(got, want * completion[:, 1:], rtol=1e-5, atol=1e-5)
    reference = trainer.compute_ref_log_probs(trainer.model, batch)
    assert ((got.sum(1) - torch.cat(reference)).abs() > 1e-3).all()  # which has none of them


def test_ranks_that_are_given_one_batch_count_its_tokens_once(
    tmp_path: Any, monkeypatch: Any
) -> None:
    def counts() -> dict[str, float]:
        trainer = train(FusedDPOTrainer, tmp_path, max_steps=1)
        names = ("num_tokens", "tokens/computed", "tokens/padded")
        return {name: trainer.state.log_history[0][name] for name in names}

    alone = counts()
    assert min(alone.values()) > 10
    monkeypatch.setattr(FusedDPOTrainer, "_tensor_parallel_size", lambda trainer: 2)
    halves = {name: count / 2 for name, count in alone.items()}
    assert counts() == halves | {"num_tokens": alone["num_tokens"] // 2}


def test_aux_loss_is_logged_and_changes_the_loss(tmp_path: Any) -> None:
    on, off = (
        train(FusedDPOTrainer, tmp_path, family="mixtral", router_aux_loss_coef=coef, max_steps=1)
        for coef in (0.5, 0.0)
    )
    first_on, first_off = logged(on)[0], logged(off)[0]
    assert "aux_loss" not in first_off
    difference = first_on["loss"] - first_off["loss"]
    assert difference == pytest.approx(0.5 * first_on["aux_loss"], rel=1e-4)


def test_model_given_by_path_gets_a_reference_of_its_own(tmp_path: Any) -> None:
    make_model().save_pretrained(tmp_path / "model")
    logs = []
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        trainer = train(
            trainer_class, tmp_path, model=str(tmp_path / "model"), with_ref_model=False
        )
        logs.append(logged(trainer))
    assert_equal_logs(logs[1], logs[0])


def test_data_set_of_token_ids_trains_like_its_text(tmp_path: Any) -> None:
    # DPOTrainer takes text only; what it makes of it is taken here as it is.
    options: dict[str, Any] = {"max_length": 12, "max_steps": 3}
    theirs = train(DPOTrainer, tmp_path, eval_rows=make_pairs(6, seed=1), **options)
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    rows = theirs.train_dataset.select_columns(columns).to_list()
    rows.insert(0, rows[0] | {"prompt_ids": [3] * 12})  # dropped: max_length leaves no completion
    eval_rows = theirs.eval_dataset.select_columns(columns).to_list()
    ours = train(FusedDPOTrainer, tmp_path, rows=rows, eval_rows=eval_rows, **options)
    assert_equal_logs(logged(ours), logged(theirs))
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)
    iterable = theirs.train_dataset.select_columns(columns).to_iterable_dataset()
    prepared = ours._prepare_dataset(iterable, None, ours.args, "train")
    assert [row["prompt_ids"] for row in prepared] == [row["prompt_ids"] for row in rows[1:]]


def test_evaluate_accepts_a_data_set_that_comes_late(tmp_path: Any) -> None:
    late = {"late": Dataset.from_list(make_pairs(6, seed=5))}
    theirs = train(DPOTrainer, tmp_path).evaluate(late)
    ours = train(FusedDPOTrainer, tmp_path).evaluate(late)
    assert {name for name in ours if "_tokens/" not in name} == theirs.keys()
    assert ours["eval_late_loss"] == pytest.approx(theirs["eval_late_loss"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*return_outputs.*:FutureWarning")
def test_compute_metrics_gets_the_same_logits_as_from_trl(tmp_path: Any) -> None:
    seen = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(torch.as_tensor(prediction.predictions))
        return {"largest": float(prediction.predictions.max())}

    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        train(
            trainer_class,
            tmp_path,
            eval_rows=make_pairs(4, seed=1),
            eval_strategy="steps",
            eval_steps=3,
            keywords={"compute_metrics": compute_metrics},
        )
    theirs, ours = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert theirs
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_attributes_that_a_callback_changes_count_from_then_on(tmp_path: Any) -> None:
    class Changes(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer.loss_types, trainer.loss_weights = ["robust", "ipo"], [0.5, 0.1]
            trainer.label_smoothing, trainer.beta = 0.2, 0.3

    logs = []
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        trainer = make_trainer(trainer_class, tmp_path, max_steps=3)
        trainer.add_callback(Changes())
        trainer.train()
        logs.append(logged(trainer))
    assert_equal_logs(logs[1], logs[0])


def test_compute_ref_log_probs_equals_trl_and_leaves_no_graph(tmp_path: Any) -> None:
    results = []
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        trainer = train(trainer_class, tmp_path, max_steps=1)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        results.append(trainer.compute_ref_log_probs(trainer.ref_model, batch))
    for theirs, ours in zip(*results, strict=True):
        assert not ours.requires_grad
        assert ours.shape == (4,)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_data_parallel_is_refused_at_construction(tmp_path: Any) -> None:
    args = make_config(tmp_path)
    args._n_gpu = 2  # as with two GPUs and no launcher
    with pytest.raises(ValueError, match=r"nn\.DataParallel"):
        FusedDPOTrainer(
            make_model(),
            args=args,
            train_dataset=Dataset.from_list(make_pairs(4)),
            processing_class=make_tokenizer(),
            ref_model=make_model(),
        )


@pytest.mark.parametrize(
    ("parallelism", "options", "refused"),
    [
        ({"cp_size": 2}, {}, "cp_size must be 1"),
        ({"sp_size": 2}, {}, "sp_size must be 1"),
        ({"tp_size": 2}, {"precompute_ref_log_probs": True}, "tp_size must be 1 with ref_store"),
        ({"tp_size": 2}, {}, None),
        ({"dp_shard_size": 2}, {"precompute_ref_log_probs": True}, None),
    ],
)
def test_parallelism_that_cuts_sequences_is_refused_by_name(
    parallelism: dict[str, int],
    options: dict[str, Any],
    refused: str | None,
    tmp_path: Any,
    monkeypatch: Any,
) -> None:
    # Accelerate gets one from its launcher, and takes none on a CPU.
    if not parallelism.keys() <= {f.name for f in fields(accelerate.ParallelismConfig)}:
        pytest.skip(f"accelerate {accelerate.__version__} does not have this parallelism")
    config = accelerate.ParallelismConfig(**parallelism)
    create = transformers.Trainer.create_accelerator_and_postprocess

    def create_with_parallelism(trainer: Any) -> None:
        create(trainer)
        kept = property(lambda _: config)
        monkeypatch.setattr(accelerate.Accelerator, "parallelism_config", kept)

    monkeypatch.setattr(
        transformers.Trainer, "create_accelerator_and_postprocess", create_with_parallelism
    )
    expected = pytest.raises(ValueError, match=refused) if refused else contextlib.nullcontext()
    with expected:
        make_trainer(FusedDPOTrainer, tmp_path, with_ref_model=not options, max_steps=1, **options)


def test_trls_names_are_back_after_construction_even_when_it_fails(tmp_path: Any) -> None:
    originals = {name: getattr(trl_dpo, name) for name in replaced_names()}
    assert originals
    seen = []
    prepare = FusedDPOTrainer._prepare_dataset

    def looks(trainer: Any, *arguments: Any) -> Any:
        seen.append({name: getattr(trl_dpo, name) for name in originals})
        return prepare(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedDPOTrainer, "_prepare_dataset", looks)
        train(
            FusedDPOTrainer,
            tmp_path,
            max_steps=1,
            keywords={"ref_store": tmp_path / "refs"},
            with_ref_model=False,
        )
    assert all(seen[0][name] is not original for name, original in originals.items())
    with pytest.raises(ValueError, match="train_dataset"):
        FusedDPOTrainer(make_model(), args=make_config(tmp_path), processing_class=make_tokenizer())
    assert {name: getattr(trl_dpo, name) for name in originals} == originals


@pytest.mark.parametrize("by_path", [False, True])
def test_autocast_holds_for_policy_and_reference(by_path: bool, tmp_path: Any) -> None:
    # accelerate wraps the forward that it finds: a head that came later would run outside.
    make_model().save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    dtypes = []
    original = head_module.linear_token_logps

    def spy(*args: Any, **keywords: Any) -> Any:
        dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return original(*args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "linear_token_logps", spy)
        train(
            FusedDPOTrainer,
            tmp_path,
            model=path if by_path else None,
            with_ref_model=not by_path,
            bf16=True,
            max_steps=1,
        )
    assert dtypes == [torch.bfloat16, torch.bfloat16]


def test_trainer_goes_through_our_head_for_policy_and_reference(
    tmp_path: Any, monkeypatch: Any
) -> None:
    calls = []
    original = head_module.linear_token_logps

    def spy(*args: Any, **keywords: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return original(*args, **keywords)

    monkeypatch.setattr(head_module, "linear_token_logps", spy)
    train(FusedDPOTrainer, tmp_path, max_steps=2)
    assert calls == [True, False] * 2


class Transfers(TorchDispatchMode):
    """Counts what would wait for another device: reading a number, a list or a copy on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_metrics_of_a_step_cost_one_transfer(family: str, tmp_path: Any, monkeypatch: Any) -> None:
    # tolist, cpu and numpy do not pass through the dispatcher for a tensor that is on the host.
    per_step, inside = [], Transfers()
    for name in ("tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(tensor: Any, *args: Any, _original: Any = original, **keywords: Any) -> Any:
            inside.count += 1
            return _original(tensor, *args, **keywords)

        monkeypatch.setattr(torch.Tensor, name, counted)
    step_metrics = metrics_module.step_metrics

    def measured(*args: Any) -> Any:
        inside.count = 0
        with inside:
            result = step_metrics(*args)
        per_step.append(inside.count)
        return result

    monkeypatch.setattr(trainer_module, "step_metrics", measured)
    train(FusedDPOTrainer, tmp_path, family=family, max_steps=3)
    assert per_step == [1, 1, 1]


def test_loss_reads_nothing_from_the_device_beyond_labels_and_metrics(
    tmp_path: Any, monkeypatch: Any
) -> None:
    # The public functions check labels (and lengths, on the CPU); what is left is the trainer's
    # own.
    mode, per_step = Transfers(), []

    def uncounted(function: Any) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            before = mode.count
            result = function(*args, **keywords)
            mode.count = before
            return result

        return call

    for module, name in (
        (head_module, "linear_token_logps"),
        (trainer_module, "pair_logps"),
        (trainer_module, "step_metrics"),
    ):
        monkeypatch.setattr(module, name, uncounted(getattr(module, name)))
    compute = FusedDPOTrainer._compute_loss

    def measured(self: Any, *args: Any) -> Any:
        # The backbone reads masks; that is the model's, and the same in TRL.
        mode.count = 0
        with mode:
            result = compute(self, *args)
        per_step.append(mode.count)
        return result

    backbone_reads: list[int] = []
    original_backbone = head_module._backbone

    def backbone(model: Any, config: Any) -> Any:
        run = original_backbone(model, config)

        def call(*args: Any, **keywords: Any) -> Any:
            before = mode.count
            result = run(*args, **keywords)
            backbone_reads.append(mode.count - before)
            mode.count = before
            return result

        return call

    monkeypatch.setattr(head_module, "_backbone", backbone)
    monkeypatch.setattr(FusedDPOTrainer, "_compute_loss", measured)
    train(FusedDPOTrainer, tmp_path, max_steps=2)
    assert backbone_reads
    assert per_step == [0, 0]


def test_trl_would_need_many_transfers_so_the_count_above_can_fail(tmp_path: Any) -> None:
    trainer = train(DPOTrainer, tmp_path, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with Transfers() as mode, warnings.catch_warnings():
        trainer._compute_loss(trainer.model, batch, return_outputs=False)
    assert mode.count > 10
