"""Trainings from a configuration: what they write, that they are TRL's, and stages."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pytest

pytest.importorskip("trl", reason="fusedpo.tools.train needs TRL")

import torch
from datasets import Dataset
from fusedpo import RefStore
from fusedpo.tools.train import plan_stages, train, train_stages
from fusedpo.tools.train.kl import NOT_FINITE, KLEstimate
from fusedpo.tools.train.report import warnings_of
from fusedpo.trl import FusedDPOTrainer
from tools_train_helpers import no_plots, tiny_config, write_rows  # noqa: F401
from transformers import AutoModelForCausalLM
from trl import DPOConfig
from trl_helpers import (
    conversational,
    make_pairs,
    make_tokenizer,
    one_thread,  # noqa: F401
    record_scored_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(folder: str) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_dpo_leaves_a_model_a_history_a_report_and_a_plot(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    report = train(
        {**tiny, "strategy": "dpo", "eval_split": 0.25, "max_steps": 6, "kl_max_new_tokens": 8},
        output_dir=str(tmp_path / "run"),
    )
    assert (report.accuracy, report.margin) == (
        report.metrics["eval_rewards/accuracies"],
        report.metrics["eval_rewards/margins"],
    )
    assert report.margin is not None
    assert report.margin > 0
    assert isinstance(report.kl, KLEstimate)
    assert report.kl.kl > 0
    assert report.tokens_per_second is not None
    assert report.tokens_per_second > 0
    folder = pathlib.Path(report.model_dir)
    assert {"model.safetensors", "tokenizer.json", "trainer_state.json", "training_args.bin"} <= {
        each.name for each in folder.iterdir()
    }
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert sum("loss" in entry for entry in history) == 6
    written = json.loads((folder / "report.json").read_text())
    assert written == json.loads(json.dumps(report.as_dict()))
    assert written["run"]["arguments"]["max_steps"] == 6
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "| reward margin |" in page
    assert "KL to the reference" in page
    assert "`max_steps=6`" in page
    # The reference came from a store below the run's folder.
    (store,) = (folder / "ref_store").iterdir()
    rows = {tuple(row.values()) for row in make_pairs(24)}
    assert len(RefStore(str(store))) == len({(p, c) for p, *both in rows for c in both})


@pytest.mark.usefixtures("no_plots")
def test_a_run_is_the_trainer_with_the_same_arguments(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    report = train({**tiny, "strategy": "ipo", "beta": 0.3}, output_dir=str(tmp_path / "run"))
    trainer = FusedDPOTrainer(
        tiny["model_name"],
        args=DPOConfig(
            output_dir=str(tmp_path / "other"),
            loss_type=["ipo"],
            beta=0.3,
            bf16=False,
            use_cpu=not torch.accelerator.is_available(),
            precompute_ref_log_probs=True,
            **{
                name: value for name, value in tiny.items() if name not in ("model_name", "dataset")
            },
        ),
        train_dataset=Dataset.from_list(make_pairs(24)),
    )
    trainer.train()
    want = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["loss"] for entry in history if "loss" in entry] == want
    trained = weights(report.model_dir)
    assert all(torch.equal(trained[k], v) for k, v in trainer.model.state_dict().items())


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("sft", {}),
        ("kto", {}),
        ("orpo", {}),
        ("cpo", {"loss_type": "hinge"}),
        ("simpo", {"lora_r": 4}),
        ("apo_zero", {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}),
    ],
)
def test_every_trainer_runs_on_the_fused_head(
    strategy: str,
    options: dict[str, Any],
    tiny: dict[str, Any],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = record_scored_rows(monkeypatch)
    report = train(
        {**tiny, "strategy": strategy, "eval_split": 4, "kl_max_new_tokens": 4, **options},
        output_dir=str(tmp_path),
    )
    assert len(rows) >= 2
    assert isinstance(report.kl, KLEstimate)
    assert report.metrics["eval_loss"] > 0
    assert report.tokens_per_second is not None
    adapter = pathlib.Path(report.model_dir, "adapter_model.safetensors")
    assert adapter.exists() == ("lora_r" in options)


@pytest.mark.usefixtures("no_plots")
def test_sft_then_dpo_goes_on_with_the_model_of_the_first_stage(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    sft, dpo = train_stages(
        [
            {**tiny, "strategy": "sft", "lora_r": 4},
            # It may name the model of the first stage again.
            {**tiny, "strategy": "dpo", "learning_rate": 0.0, "lora_r": 4},
        ],
        output_dir=str(tmp_path),
    )
    assert (sft.model_dir, dpo.model) == (str(tmp_path / "1-sft"), sft.model_dir)
    # Trained with a rate of 0, the second one is the first one.
    first, second, base = (weights(f) for f in (sft.model_dir, dpo.model_dir, tiny["model_name"]))
    (name,) = [n for n in second if n.endswith("layers.0.self_attn.q_proj.base_layer.weight")]
    plain = name.replace(".base_layer", "")
    assert not torch.equal(second[name], base[plain])
    adapted = AutoModelForCausalLM.from_pretrained(sft.model_dir)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        want = adapted(ids).logits
        got = AutoModelForCausalLM.from_pretrained(dpo.model_dir)(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(first) == len(second)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"model_name": "another"}, "a later one names 'another'"),
        ({"output_dir": "first"}, "must have an output_dir of its own"),
        ({"learning_rte": 1.0}, "no option"),
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_a_wrong_second_stage_stops_before_the_first_begins(
    second: dict[str, Any],
    message: str,
    tiny: dict[str, Any],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    stages = [
        {**tiny, "strategy": "sft", "output_dir": "first"},
        {**tiny, "strategy": "dpo", "output_dir": "second", **second},
    ]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_stages(stages)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_the_arguments_and_writes_nothing(
    tiny: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = train(
        {**tiny, "strategy": "simpo", "lora_r": 4, "warmup_ratio": 0.5, "eval_split": 4},
        dry_run=True,
    )
    assert list(tmp_path.iterdir()) == []
    told = json.loads(json.dumps(plan.as_dict()))
    assert told["run"]["trainer"] == "fusedpo.trl.cpo_orpo.FusedCPOTrainer"
    assert told["run"]["arguments"]["warmup_steps"] == 0.5
    assert told["run"]["peft"]["r"] == 4
    assert (told["data"]["train_rows"], told["data"]["eval_rows"]) == (20, 4)
    assert told["memory_estimate"]["total"] > 0


def test_stages_are_planned_without_the_model_that_is_not_there_yet(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    stages = [{**tiny, "strategy": name} for name in ("sft", "dpo")]
    plans = plan_stages(stages, output_dir=str(tmp_path / "both"))
    assert plans[1].run.model == plans[0].run.output_dir
    assert plans[1].memory.parameters == plans[0].memory.parameters


def test_a_chat_template_of_an_earlier_stage_serves_the_later_ones(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    bare = make_tokenizer()
    bare.chat_template = None
    shutil.copytree(tiny["model_name"], tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    bare.save_pretrained(tmp_path / "bare")
    path = write_rows(tmp_path / "chat.jsonl", conversational(make_pairs(8)))
    options = {**tiny, "model_name": str(tmp_path / "bare"), "dataset": path}
    sft, dpo = ({**options, "strategy": name} for name in ("sft", "dpo"))
    with pytest.raises(ValueError, match="need a chat template"):
        plan_stages([dpo])
    with_template = {**sft, "chat_template_path": tiny["model_name"]}
    assert len(plan_stages([with_template, dpo], output_dir=str(tmp_path / "both"))) == 2


def test_what_a_reader_must_not_miss_is_a_warning() -> None:
    data = {"unreadable_rows": 0, "unused_rows": 0, "eval_rows": 5, "problems": []}
    near, far = (KLEstimate(kl, 0.2, 8, 80, 16) for kl in (9.9, 10.1))
    assert warnings_of({"eval_loss": 0.5}, near, data) == []
    (warning,) = warnings_of({"eval_loss": 0.5}, far, data)
    assert "the KL to the reference is above 10 nats" in warning
    assert "Raise beta" in warning
    for broken_kl in (KLEstimate(float("nan"), 0.2, 8, 80, 16), f"ValueError: {NOT_FINITE}"):
        (warning,) = warnings_of({"eval_loss": 0.5}, broken_kl, data)
        assert "no number: the policy's logits are not finite." in warning
    (warning,) = warnings_of({"train_loss": float("nan")}, near, data)
    assert "diverged" in warning
    broken = {"unreadable_rows": 2, "unused_rows": 1, "eval_rows": 0, "problems": ["a:1: b"]}
    assert len(warnings_of({"train_loss": 1.0}, "nothing was held out", broken)) == 3


@pytest.mark.usefixtures("no_plots")
def test_without_an_eval_split_the_report_says_what_it_lacks(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    report = train({**tiny, "strategy": "sigmoid"}, output_dir=str(tmp_path))
    assert report.kl == "nothing was held out"
    assert report.accuracy == report.metrics["train_rewards/accuracies"]
    assert report.as_dict()["kl"] is None
    assert any("Set eval_split" in each for each in report.warnings)


@pytest.mark.usefixtures("no_plots")
def test_a_training_on_an_adapter_names_a_base_that_exists(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    one = train({**tiny, "strategy": "sft", "lora_r": 4}, output_dir=str(tmp_path / "one"))
    two = train(
        {**tiny, "strategy": "dpo", "lora_r": 4, "model_name": one.model_dir},
        output_dir=str(tmp_path / "two"),
    )
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "two" / "start")
    assert pathlib.Path(two.model_dir, "start", "model.safetensors").exists()


@pytest.mark.usefixtures("no_plots")
def test_conversations_are_trained_on_and_sampled_with_the_chat_template(
    tiny: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    path = write_rows(tmp_path / "chat.jsonl", conversational(make_pairs(8)))
    options = {**tiny, "dataset": path, "eval_split": 2, "kl_max_new_tokens": 4, "max_steps": 1}
    report = train({**options, "strategy": "dpo"}, output_dir=str(tmp_path / "out"))
    assert report.data["form"] == "conversational"
    assert isinstance(report.kl, KLEstimate)
