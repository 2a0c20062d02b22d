"""A judge that prefers length, on a trained model: every round makes the answers longer, and the
pathology report says so."""

from __future__ import annotations

import json
import pathlib

import judges
import pytest

pytest.importorskip("trl", reason="iterate trains with TRL")
pytest.importorskip("rapidfuzz", reason="near-duplicates need rapidfuzz")

from fusedpo.tools.iterate import iterate
from fusedpo.tools.sampling import Sampling
from trl_helpers import one_thread  # noqa: F401  a fixture

pytestmark = [pytest.mark.real_data, pytest.mark.usefixtures("one_thread")]


def beginnings(path: pathlib.Path, count: int) -> list[str]:
    """Stories without their last sentence, after which the model ends soon, or goes on."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sentences = [(row["prompt"] + row["chosen"]).split(". ") for row in rows]
    return [". ".join(each[:-1]) + "." for each in sentences if len(each) > 4][:count]


def test_three_rounds_of_a_judge_of_length_make_the_answers_longer(
    real_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    report = iterate(
        beginnings(real_data / "preferences" / "tinystories-vs-260k.jsonl", 10),
        model=real_data / "models" / "stories260K",
        judge=judges.longer,
        config={
            "strategy": "dpo",
            "num_train_epochs": 3,
            "per_device_train_batch_size": 5,
            "max_length": 512,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        },
        output=tmp_path / "out",
        rounds=3,
        beta=[0.05, 0.03, 0.03],
        learning_rate=1e-3,
        sampling=Sampling(n=4, max_new_tokens=256, batch_size=40),
    )
    told = [each.pathologies for each in report.rounds]
    print([(each.mean_characters, each.length_ratio, each.counts) for each in told])
    characters = [each.mean_characters for each in told]
    assert characters == sorted(characters), characters
    assert told[-1].length_ratio is not None
    assert told[-1].length_ratio > 1.3
    # An answer may be verbose beside the others to its prompt: not none at the beginning, but few.
    assert told[-1].share("verbosity") > told[0].share("verbosity") + 0.1
    assert all(each.pairs.longer_chosen == 1.0 for each in report.rounds if each.pairs)
