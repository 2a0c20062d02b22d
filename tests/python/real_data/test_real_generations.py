"""Generations of trained weights, and the pathology checks on real answers."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the tools need the extras")

from fusedpo.tools.generate import generate
from fusedpo.tools.generations import read_prompts
from fusedpo.tools.pathologies import PathologyReport, check
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from trl_helpers import one_thread  # noqa: F401  a fixture

pytestmark = [pytest.mark.real_data, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def stories(request: pytest.FixtureRequest) -> tuple[pathlib.Path, list[Any]]:
    folder = request.getfixturevalue("real_data")
    prompts = read_prompts(folder / "preferences" / "tinystories-vs-260k.jsonl", limit=16)
    return folder / "models" / "stories260K", prompts


def test_stories_are_stories_and_the_same_in_any_batch(stories: Any) -> None:
    model, prompts = stories
    made = generate(model, prompts, max_new_tokens=100, batch_size=16)
    one_by_one = generate(model, prompts, max_new_tokens=100, batch_size=1)
    # A padded batch rounds otherwise; a tie that falls the other way changes the rest of a text.
    assert sum(a == b for a, b in zip(made, one_by_one, strict=True)) >= len(prompts) - 1
    assert all(each.completion.startswith(" ") for each in made)
    assert not check(made).findings


def test_low_temperature_runs_into_repetition(stories: Any) -> None:
    model, prompts = stories
    low = check(generate(model, prompts, temperature=0.1, max_new_tokens=400, batch_size=16))
    print(f"repetition at temperature 0.1: {low.counts['repetition']} of {low.completions}")
    assert low.counts["repetition"] >= 3
    assert low.counts["degenerate"] == 0


@pytest.mark.parametrize("vocabulary", ["gpt2", "gpt-neox-20b", "qwen2.5", "minimind-6400"])
def test_untrained_models_write_degenerate_text(real_data: pathlib.Path, vocabulary: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / vocabulary)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes, **heads)
    )
    made = generate(model, ["Tell me a story."], n=8, tokenizer=tokenizer, max_new_tokens=60)
    assert check(made).counts["degenerate"] >= 7


# The most alarms per hundred answers. Read one by one, those of llamafactory and llmbar are
# refusals and compliments indeed, as machines write them, and PandaLM's 7B models do repeat
# themselves.
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("tinystories-vs-260k", {}),
        ("stackexchange-paired-tiny", {}),
        ("llamafactory-dpo-en", {"flattery": 0.5, "evasion": 1}),
        ("llmbar", {"flattery": 0.5, "evasion": 2}),
        ("llamafactory-dpo-zh", {"evasion": 3, "degenerate": 1}),
        ("pandalm-human", {"repetition": 4, "degenerate": 0.2}),
    ],
)
def test_chosen_answers_raise_few_alarms(
    real_data: pathlib.Path, name: str, most: dict[str, float]
) -> None:
    with (real_data / "preferences" / f"{name}.jsonl").open(encoding="utf-8") as file:
        report = check([json.loads(line)["chosen"] for line in file])
    print(f"{name}: {report.completions} answers, {_shares(report)}")
    for check_name in report.counts:
        assert 100 * report.share(check_name) <= most.get(check_name, 0), check_name


def _shares(report: PathologyReport) -> str:
    return ", ".join(f"{name} {report.share(name):.1%}" for name in report.counts)
