"""`fusedpo train` on trained weights and real preferences, and on files of other forms."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

pytest.importorskip("trl", reason="fusedpo.tools.train needs TRL")

from fusedpo.tools.train import train, train_stages
from fusedpo.tools.train.kl import KLEstimate
from tools_train_helpers import no_plots  # noqa: F401
from trl_helpers import one_thread  # noqa: F401

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.usefixtures("one_thread", "no_plots"),
]


def options(real_data: pathlib.Path, data: str) -> dict[str, Any]:
    return {
        "model_name": str(real_data / "models" / "stories260K"),
        "dataset": str(real_data / data),
        "max_seq_length": 256,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def test_dpo_learns_to_prefer_and_the_report_tells_how_far_it_went(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    report = train(
        {
            **options(real_data, "preferences/tinystories-vs-260k.jsonl"),
            "strategy": "dpo",
            "eval_split": 16,
            "max_steps": 12,
            "learning_rate": 2e-4,
            "warmup_ratio": 0.1,
            "kl_max_new_tokens": 32,
            "ref_store": False,  # the store would score all 850 pairs
        },
        output_dir=str(tmp_path),
    )
    assert report.accuracy is not None
    assert report.accuracy > 0.7
    assert report.margin is not None
    assert report.margin > 0.2
    assert isinstance(report.kl, KLEstimate)
    assert 3 * report.kl.standard_error < report.kl.kl < 30


def test_sft_on_texts_then_kto_on_labelled_completions(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    stages = [
        {**options(real_data, "text/tinystories-850.jsonl"), "strategy": "sft", "max_steps": 2},
        {**options(real_data, "kto/llamafactory-kto-en.jsonl"), "strategy": "kto", "max_steps": 1},
    ]
    sft, kto = train_stages(stages, output_dir=str(tmp_path))
    assert sft.data["form"] == "sft"
    assert (kto.data["form"], kto.model) == ("kto", sft.model_dir)


def test_conversations_without_a_chat_template_are_refused_with_the_remedy(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    conversations = {
        **options(real_data, "formats/llamafactory-dpo_en_demo.json"),
        "strategy": "dpo",
    }
    with pytest.raises(ValueError, match=r"the tokenizer of .* has none. Write them as texts"):
        train(conversations, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
