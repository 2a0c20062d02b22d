"""FusedDPOTrainer where a script has DPOTrainer: checkpoints, callbacks, cards and config files."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from datasets import Dataset
from fusedpo.trl import FusedDPOTrainer
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, TrlParser
from trl_helpers import (
    assert_equal_logs,
    logged,
    lora,
    make_config,
    make_model,
    make_pairs,
    make_tokenizer,
    one_thread,  # noqa: F401  a fixture
    train,
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def build(trainer_class: Any, folder: pathlib.Path, adapter: bool, **keywords: Any) -> Any:
    set_seed(0)
    return trainer_class(
        make_model(),
        ref_model=None if adapter else make_model(),
        args=make_config(folder, **STEPS),
        train_dataset=Dataset.from_list(make_pairs()),
        processing_class=make_tokenizer(),
        peft_config=lora() if adapter else None,
        **keywords,
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    ("first", "second"), [(DPOTrainer, FusedDPOTrainer), (FusedDPOTrainer, DPOTrainer)]
)
def test_a_checkpoint_of_one_trainer_is_resumed_by_the_other(
    first: Any, second: Any, adapter: bool, tmp_path: pathlib.Path
) -> None:
    whole = build(first, tmp_path / "whole", adapter)
    whole.train()
    resumed = build(second, tmp_path / "resumed", adapter)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    curves = [logged(each)[:4] for each in (resumed, whole)]
    # The log of the first steps is in the checkpoint. TRL counts tokens anew after it.
    assert curves[0][2].pop("num_tokens") < curves[1][2].pop("num_tokens")
    assert curves[0][3].pop("num_tokens") < curves[1][3].pop("num_tokens")
    assert_equal_logs(*curves)
    a, b = (dict(each.model.named_parameters()) for each in (whole, resumed))
    assert a.keys() == b.keys()
    for name, parameter in a.items():
        torch.testing.assert_close(parameter, b[name], rtol=1e-4, atol=1e-5)


def test_saved_checkpoints_and_cards_are_those_of_trl(tmp_path: pathlib.Path) -> None:
    folders = {}
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        folder = tmp_path / trainer_class.__name__ / "run"
        build(trainer_class, folder, adapter=False).train()
        folders[trainer_class] = folder / "checkpoint-4"
    theirs, ours = folders.values()
    files = [sorted(path.name for path in folder.iterdir()) for folder in (theirs, ours)]
    assert files[0] == files[1]
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(files[0])
    cards = [(folder.parent / "README.md").read_text() for folder in (theirs, ours)]
    assert "DPO" in cards[0]
    assert cards[0] == cards[1]
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    weights = [load_file(folder / "model.safetensors") for folder in (theirs, ours)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5)
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (theirs, ours)]
    assert states[0].keys() == states[1].keys()


class Recorder(TrainerCallback):  # type: ignore[misc]
    """What a callback is told, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.events.append(("train begins", sorted(given)))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.events.append(("step", state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        names = [name for name in given["logs"] if "tokens/" not in name]  # ours alone
        self.events.append(("log", sorted(names)))

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.events.append(("save", state.global_step))


def test_callbacks_and_trackers_are_told_what_trl_tells(tmp_path: pathlib.Path) -> None:
    # Trackers (`report_to`) are callbacks of transformers, told by on_log.
    events = []
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        recorder = Recorder()
        build(trainer_class, tmp_path, adapter=False, callbacks=[recorder]).train()
        events.append(recorder.events)
    assert events[0] == events[1]
    assert ("save", 2) in events[0]
    assert sum(kind == "log" for kind, _ in events[0]) == 5


def test_report_to_tensorboard_writes_trls_tags(tmp_path: pathlib.Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    scalars = []
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        folder = tmp_path / trainer_class.__name__
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
            train(trainer_class, folder, max_steps=2, report_to="tensorboard")
        events = reader.EventAccumulator(str(next(folder.rglob("events.*")).parent)).Reload()
        tags = events.Tags()["scalars"]
        scalars.append({tag: [each.value for each in events.Scalars(tag)] for tag in tags})
    theirs, ours = scalars
    assert {tag for tag in ours if not tag.startswith("train/tokens/")} == theirs.keys()
    assert "train/rewards/margins" in theirs
    assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)


def test_config_files_of_trls_parser_build_the_trainer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "dpo.yaml"
    config.write_text(
        f"output_dir: {tmp_path / 'run'}\nbeta: 0.3\nloss_type: [sigmoid, sft]\n"
        "loss_weights: [1.0, 0.5]\nmax_steps: 2\nbf16: false\nuse_cpu: true\n"
        "report_to: none\nlogging_steps: 1\n"
    )
    monkeypatch.setattr("sys.argv", ["dpo.py", "--config", str(config), "--learning_rate", "0.003"])
    logs = []
    for trainer_class in (DPOTrainer, FusedDPOTrainer):
        (args,) = TrlParser(DPOConfig).parse_args_and_config()
        assert (args.beta, args.learning_rate) == (0.3, 0.003)
        trainer = trainer_class(
            make_model(),
            ref_model=make_model(),
            args=args,
            train_dataset=Dataset.from_list(make_pairs(8)),
            processing_class=make_tokenizer(),
        )
        trainer.train()
        logs.append(logged(trainer))
    assert_equal_logs(logs[1], logs[0])
