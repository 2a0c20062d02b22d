"""Training with a reference store: the numbers of an online reference, without one in memory."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

import fusedpo.trl.ref_store as ref_store_module
import peft
import trl.trainer.dpo_trainer as trl_dpo
from datasets import Dataset
from fusedpo import RefStore, StoreError, precompute
from fusedpo._precompute.records import keys_of
from fusedpo.trl import FusedDPOTrainer
from fusedpo.trl.ref_batches import records_of_batch
from fusedpo.trl.versions import at_least
from precompute_helpers import contents, exact, write_inputs
from transformers import AutoModelForCausalLM, set_seed
from trl import DPOConfig
from trl_helpers import (
    BEFORE_5,
    assert_equal_logs,
    conversational,
    logged,
    lora,
    lora_model,
    make_config,
    make_model,
    make_pairs,
    make_tokenizer,
    one_thread,  # noqa: F401  a fixture
    train,
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

EPS = float(np.finfo(np.float32).eps)
BOUND = 8  # times eps (sum |logp_t| + max |z|), for a sequence in fp32

SETUPS: dict[str, Any] = {
    "full fine-tuning": dict,
    "conversational data": lambda: {"rows": conversational(make_pairs())},
    "LoRA": lambda: {"keywords": {"peft_config": lora()}},
    "LoRA trained before, with a ref adapter": lambda: {"model": lora_model()},
    "prompt tuning": lambda: {
        "keywords": {
            "peft_config": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        },
    },
    "a reference that is another model": lambda: {
        "keywords": {"ref_model": make_model(seed=1)},
    },
    "gradient accumulation and checkpointing": lambda: {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": True,
    },
    "evaluation": lambda: {
        "eval_rows": make_pairs(8, seed=1),
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    "cut at the end": lambda: {"max_length": 9},
    "cut at the start": lambda: {"max_length": 7, "truncation_mode": "keep_end"},
    "softcap": lambda: {"family": "gemma2 softcap"},
    "LD-DPO": lambda: {"ld_alpha": 0.3},
    "WPO": lambda: {"use_weighting": True},
    "lengths and a list of losses": lambda: {"loss_type": ["ipo", "sft"], "loss_weights": [1, 0.5]},
}


def online(folder: pathlib.Path, setup: str) -> list[dict[str, float]]:
    options = SETUPS[setup]()
    # Under PEFT, and with a model of its own, the trainer has a reference; else it gets a copy.
    own = {"peft_config", "ref_model"} & options.get("keywords", {}).keys() or "model" in options
    return logged(train(FusedDPOTrainer, folder, **options, with_ref_model=not own))


def assert_equal(trainer: Any, want: list[dict[str, float]]) -> None:
    """Compare what was logged. While policy and reference are one model, rewards are rounding
    errors, and the accuracy is the sign of rounding errors."""
    got = logged(trainer)
    for mine, theirs in zip(got, want, strict=True):
        for prefix in ("", "eval_"):
            if abs(theirs.get(f"{prefix}rewards/margins", 1.0)) < 1e-5:
                mine[f"{prefix}rewards/accuracies"] = theirs[f"{prefix}rewards/accuracies"]
    assert_equal_logs(got, want)


def with_store(folder: pathlib.Path, store: Any, **options: Any) -> Any:
    keywords = {"ref_store": store} | options.pop("keywords", {})
    return train(FusedDPOTrainer, folder, keywords=keywords, with_ref_model=False, **options)


@pytest.mark.filterwarnings("ignore:.*keep_end.*")
@pytest.mark.parametrize("setup", SETUPS)
def test_logs_equal_those_with_an_online_reference(
    setup: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*args: Any, **keywords: Any) -> Any:
        raise AssertionError("a reference model was loaded")

    want = online(tmp_path / "online", setup)
    monkeypatch.setattr(trl_dpo, "create_model_from_path", no_model)
    monkeypatch.setattr(ref_store_module, "create_model_from_path", no_model)
    for _ in range(2):  # the second time everything is there
        trainer = with_store(tmp_path / "run", tmp_path / "refs", **SETUPS[setup]())
        assert_equal(trainer, want)
    records = sum(file.records for file in RefStore(tmp_path / "refs").files())
    assert records == len(RefStore(tmp_path / "refs")) > 0, "nothing was scored twice"


def test_the_reference_runs_before_the_first_step_and_never_after(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = []
    original = FusedDPOTrainer._reference_pair
    monkeypatch.setattr(
        FusedDPOTrainer, "_reference_pair", lambda *args: forwards.append(1) or original(*args)
    )
    trainer = with_store(tmp_path, tmp_path / "refs")
    assert trainer.ref_model is None
    assert forwards == []


def by_trl(batch: Any) -> torch.Tensor:
    """Score a batch by TRL's own head, on its own."""
    model, ids = make_model().eval(), batch["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    completion = batch["completion_mask"]
    with torch.no_grad():
        if at_least(1, 15):
            trl_dpo.add_fused_lm_head(model)
            labels = ids.masked_fill(completion == 0, -100)
            token_logps = model(**inputs, labels=labels, fused_lm_head=True).log_probs
        else:
            logits = model(**inputs).logits[:, :-1]
            token_logps = trl_dpo.selective_log_softmax(logits, ids[:, 1:]) * completion[:, 1:]
    return token_logps.sum(1, dtype=torch.float64)


def test_values_and_rewards_of_step_0_keep_to_the_bound(tmp_path: pathlib.Path) -> None:
    trainer = with_store(tmp_path, tmp_path / "refs", max_steps=1, learning_rate=0.0)
    reference = make_model().double().eval()
    worst = largest = 0.0
    for start in range(0, 16, 4):
        rows = [trainer.train_dataset[i] for i in range(start, start + 4)]
        batch = trainer.data_collator(rows)
        records = records_of_batch(batch)
        scale = np.array([exact(reference, record).scale for record in records])
        stored = torch.cat(trainer._stored_reference.pair(batch, torch.float64)).numpy()
        theirs = by_trl(batch)
        difference = np.abs(stored - theirs.numpy()) / (EPS * scale)
        largest = max(largest, float(scale.max()))
        with torch.no_grad():  # the policy, which a learning rate of 0 left as it was
            policy = trainer.token_logps(trainer.model, batch).sum(1, dtype=torch.float64).numpy()
        rewards = trainer.beta * np.abs(policy - stored)
        assert (rewards <= trainer.beta * BOUND * EPS * scale).all()
        worst = max(worst, float(difference.max()))
    print(f"largest difference {worst:.2f} eps (sum |logp_t| + max |z|)")
    assert worst <= BOUND
    # At step 0 the policy is the reference. Means over the batch are below the largest bound.
    first = logged(trainer)[0]
    limit = trainer.beta * BOUND * EPS * largest
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(first[name]) <= (2 if name == "rewards/margins" else 1) * limit
    # Transformers before 5 rounds the loss.
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4 if BEFORE_5 else 1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_store_made_with_the_defaults_serves_a_training_with_the_defaults(
    adapter: bool, tmp_path: pathlib.Path
) -> None:
    inputs = write_inputs(tmp_path, rows=8)
    precompute(*inputs, str(tmp_path / "refs"))
    before = contents(tmp_path / "refs")
    trainer = FusedDPOTrainer(
        inputs.model,
        args=DPOConfig(str(tmp_path / "run"), use_cpu=True, report_to="none", max_steps=1),
        train_dataset=Dataset.from_json(inputs.data),
        peft_config=lora() if adapter else None,
        ref_store=tmp_path / "refs",
        ref_miss="error",
    )
    assert trainer.args.bf16
    trainer.train()
    assert contents(tmp_path / "refs") == before


def test_a_store_of_an_adapter_serves_the_training_that_goes_on_from_it(
    tmp_path: pathlib.Path,
) -> None:
    inputs = write_inputs(tmp_path, rows=8)
    base = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
    torch.manual_seed(3)
    adapter = str(tmp_path / "adapter")
    peft.get_peft_model(base, lora(init_lora_weights=False)).save_pretrained(adapter)
    precompute(*inputs, str(tmp_path / "refs"), ref_adapter=adapter, autocast="no")

    def policy() -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(loaded, adapter, is_trainable=True)

    rows = make_pairs(8)
    stored = with_store(
        tmp_path,
        tmp_path / "refs",
        model=policy(),
        rows=rows,
        keywords={"ref_miss": "error"},
    )
    assert "ref" in stored.model.peft_config
    trained = train(FusedDPOTrainer, tmp_path, model=policy(), rows=rows, with_ref_model=False)
    assert_equal_logs(logged(stored), logged(trained))


def test_coverage_is_printed_and_missing_records_can_be_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = write_inputs(tmp_path, rows=8)
    precompute(*inputs, str(tmp_path / "refs"), autocast="no")
    rows = make_pairs(8)
    with_store(
        tmp_path,
        tmp_path / "refs",
        model=inputs.model,
        rows=rows,
        keywords={"ref_miss": "error"},
        max_steps=1,
    )
    assert "train has 16 records in 8 rows; 16 found, 0 missing" in capsys.readouterr().out
    more = {"rows": rows, "eval_rows": make_pairs(5, seed=9), "max_steps": 1}
    with pytest.raises(
        LookupError, match=r"\d+ of \d+ records of eval are not in .*fusedpo precom"
    ):
        with_store(
            tmp_path, tmp_path / "refs", model=inputs.model, keywords={"ref_miss": "error"}, **more
        )
    capsys.readouterr()
    with_store(tmp_path, tmp_path / "refs", model=inputs.model, **more)
    shown = capsys.readouterr().out
    assert "eval: scored" in shown
    assert "train: scored" not in shown


def test_another_reference_is_refused(tmp_path: pathlib.Path) -> None:
    with_store(tmp_path, tmp_path / "refs", max_steps=1)
    before = contents(tmp_path / "refs")
    for options, field in (
        ({"model": make_model(seed=1)}, r"model\.parameters"),
        ({"bf16": True}, r"scoring\.autocast"),
        ({"model": lora_model()}, r"adapter\.parameters"),
    ):
        with pytest.raises(StoreError, match=field):
            with_store(tmp_path, tmp_path / "refs", max_steps=1, **options)
    assert contents(tmp_path / "refs") == before


def test_another_reference_can_be_used_all_the_same_but_never_added_to(
    tmp_path: pathlib.Path,
) -> None:
    with_store(tmp_path, tmp_path / "refs", max_steps=1)
    before = contents(tmp_path / "refs")
    options = {"model": make_model(seed=1), "keywords": {"ref_identity": "ignore"}, "max_steps": 1}
    with pytest.warns(UserWarning, match=r"belongs to another reference.*model\.parameters"):
        trainer = with_store(tmp_path, tmp_path / "refs", **options)
    # Rewards of step 0 are those of two different models.
    assert abs(logged(trainer)[0]["rewards/margins"]) > 1e-3
    rows = make_pairs(8, seed=7)
    with (
        pytest.warns(UserWarning, match="belongs to another reference"),
        pytest.raises(LookupError, match="are not in"),
    ):
        with_store(tmp_path, tmp_path / "refs", rows=rows, **options)
    assert contents(tmp_path / "refs") == before


def test_ignoring_is_silent_where_nothing_differs(tmp_path: pathlib.Path) -> None:
    for _ in range(2):
        with_store(tmp_path, tmp_path / "refs", max_steps=1, keywords={"ref_identity": "ignore"})


def stream(rows: list[Any]) -> Any:
    return Dataset.from_list(rows).to_iterable_dataset()


def train_stream(folder: pathlib.Path, model: Any, rows: list[Any], **keywords: Any) -> Any:
    set_seed(0)  # as `train` does
    trainer = FusedDPOTrainer(
        model,
        args=make_config(folder, max_steps=4),
        train_dataset=stream(rows),
        processing_class=make_tokenizer(),
        ref_store=folder / "refs",
        **keywords,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("adapter", [False, True])
def test_a_stream_is_looked_up_and_what_it_brings_is_scored_by_the_reference(
    adapter: bool, tmp_path: pathlib.Path
) -> None:
    inputs = write_inputs(tmp_path, rows=16)
    want = logged(
        train(
            FusedDPOTrainer,
            tmp_path,
            model=inputs.model,
            max_steps=4,
            with_ref_model=False,
            keywords={"peft_config": lora()} if adapter else None,
            train_sampling_strategy="sequential",
        )
    )
    keywords = {"peft_config": lora()} if adapter else {}
    first = train_stream(tmp_path, inputs.model, make_pairs(16), **keywords)
    assert_equal(first, want)
    # Scored while the policy was trained, yet by the reference of the beginning.
    precompute(*inputs, str(tmp_path / "plain"), autocast="no")
    plain = contents(tmp_path / "plain")
    streamed = contents(tmp_path / "refs")
    assert streamed.keys() == plain.keys()
    assert max(abs(streamed[key] - plain[key]) for key in plain) < 1e-4
    files = RefStore(tmp_path / "refs").files()
    assert files
    assert all(file.closed for file in files), "a merge may remove what a training wrote"
    again = train_stream(tmp_path, inputs.model, make_pairs(16), ref_miss="error", **keywords)
    assert again._stored_reference._loaded is None
    assert_equal(again, want)


def test_a_stream_without_a_way_back_to_the_reference_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(LookupError, match=r"cannot be loaded from .*Pass ref_model"):
        train_stream(tmp_path, make_model(), make_pairs(8))
    inputs = write_inputs(tmp_path, rows=8)
    model = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
    model.lm_head.weight.data.add_(0.1)  # no longer what its name promises
    (tmp_path / "other").mkdir()
    with pytest.raises(LookupError, match="is not the model that the training began with"):
        train_stream(tmp_path / "other", model, make_pairs(8))
    (tmp_path / "strict").mkdir()
    RefStore(tmp_path / "strict" / "refs", "a", identity=_identity(tmp_path))
    with pytest.raises(LookupError, match="records of a batch are not in"):
        train_stream(tmp_path / "strict", make_model(), make_pairs(8), ref_miss="error")


def _identity(folder: pathlib.Path) -> dict[str, Any]:
    return RefStore(folder / "refs").identity


def test_a_late_evaluation_is_scored_by_the_reference_of_the_beginning(
    tmp_path: pathlib.Path,
) -> None:
    inputs = write_inputs(tmp_path, rows=8)
    late = Dataset.from_list(make_pairs(6, seed=5))
    results = []
    for keywords in ({"ref_store": tmp_path / "refs"}, {}):
        trainer = train(
            FusedDPOTrainer, tmp_path, model=inputs.model, with_ref_model=False, keywords=keywords
        )
        results.append(trainer.evaluate(late))
    files = RefStore(tmp_path / "refs").files()
    assert len(files) == 2
    assert all(file.closed for file in files)
    for name in ("eval_loss", "eval_rewards/margins"):
        assert results[0][name] == pytest.approx(results[1][name], abs=1e-5)


def test_a_value_for_another_number_of_tokens_is_an_error(tmp_path: pathlib.Path) -> None:
    with_store(tmp_path, tmp_path / "refs", max_steps=1)
    store = RefStore(tmp_path / "refs")
    wrong = RefStore(tmp_path / "wrong", "a", identity=store.identity)
    with wrong.writer() as writer:
        for keys, logps, num_tokens, *_ in store.batches():
            writer.append(keys, logps, num_tokens + 1)
    with pytest.raises(StoreError, match="tokens to score, and the store has a value for"):
        with_store(tmp_path, tmp_path / "wrong", max_steps=1)


def test_a_split_for_evaluation_may_be_called_train(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FusedDPOTrainer(
        make_model(),
        args=make_config(tmp_path),
        train_dataset=Dataset.from_list(make_pairs(8)),
        eval_dataset={"train": Dataset.from_list(make_pairs(3, seed=4))},
        processing_class=make_tokenizer(),
        ref_store=tmp_path / "refs",
    )
    told = capsys.readouterr().out
    assert "refs: train has 16 records" in told
    assert "refs: eval train has 6 records" in told


def test_per_token_values_are_needed_for_ld_alpha_and_said_so(tmp_path: pathlib.Path) -> None:
    with_store(tmp_path, tmp_path / "refs", max_steps=1)
    options: dict[str, Any] = {"ld_alpha": 0.3, "max_steps": 1}
    with pytest.raises(LookupError, match=r"per-token values .*--per-token"):
        with_store(tmp_path, tmp_path / "refs", keywords={"ref_miss": "error"}, **options)
    with_store(tmp_path, tmp_path / "refs", **options)
    with_store(tmp_path, tmp_path / "refs", keywords={"ref_miss": "error"}, **options)


def test_precompute_ref_log_probs_keeps_a_store_below_the_output_directory(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"precompute_ref_log_probs": True, "with_ref_model": False}
    trainer = train(FusedDPOTrainer, tmp_path, **options)
    assert trainer.args.precompute_ref_log_probs
    (folder,) = (tmp_path / "ref_store").iterdir()
    assert len(RefStore(folder)) > 0
    capsys.readouterr()
    again = train(FusedDPOTrainer, tmp_path, **options)
    assert ", 0 missing" in capsys.readouterr().out
    assert logged(again) == logged(trainer)
    # Another model, for example a checkpoint to resume from, is another reference: that is told.
    with pytest.warns(UserWarning, match="stores of other references only"):
        train(FusedDPOTrainer, tmp_path, model=make_model(seed=1), **options)
    assert len(list((tmp_path / "ref_store").iterdir())) == 2


def test_where_parameters_are_sharded_trl_precomputes_and_a_store_is_refused(
    tmp_path: pathlib.Path,
) -> None:
    trainer = train(
        FusedDPOTrainer, tmp_path, precompute_ref_log_probs=True, with_ref_model=False, max_steps=1
    )
    trainer.is_deepspeed_enabled = trainer.is_fsdp_enabled = False
    assert trainer._precompute_ref_logps(trainer.train_dataset, "train", 4) is trainer.train_dataset
    trainer.is_fsdp_enabled = True
    columns = trainer._precompute_ref_logps(trainer.train_dataset, "train", 4)
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(columns.column_names)
    trainer = with_store(tmp_path, tmp_path / "refs", max_steps=1)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="under FSDP and DeepSpeed the parameters are sharded"):
        trainer._precompute_ref_logps(trainer.train_dataset, "train", 4)


def test_the_configuration_is_given_back_as_it_was(tmp_path: pathlib.Path) -> None:
    args = make_config(tmp_path, max_steps=1)
    trainer = FusedDPOTrainer(
        make_model(),
        args=args,
        train_dataset=Dataset.from_list(make_pairs(4)),
        processing_class=make_tokenizer(),
        ref_store=tmp_path / "refs",
    )
    assert trainer.args.precompute_ref_log_probs is False
    assert trl_dpo.hash_module.__module__ == "trl.trainer.utils"


def test_keys_do_not_depend_on_padding(tmp_path: pathlib.Path) -> None:
    del tmp_path
    ids = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 0, 0]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "completion_mask": torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]),
    }
    left, right = keys_of(records_of_batch(batch))
    assert left.tobytes() == right.tobytes()
