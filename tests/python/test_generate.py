"""Sampling completions: what decides a sample, and what does not."""

from __future__ import annotations

import copy
import json
import pathlib
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the tools need the extras")

from fusedpo import cli
from fusedpo.tools.generate import Generation, generate
from fusedpo.tools.generations import (
    as_markdown,
    read_generations,
    read_prompts,
    write_generations,
)
from fusedpo.tools.sampling import OwnStreams, stream_seed
from trl_helpers import lora_model, make_model, make_tokenizer, one_thread  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

# Of different lengths, so that batches have padding.
PROMPTS = ["who sees a tree ?", "who", "the old king likes the long road . who likes", "a dog ?"]
CHAT = [[{"role": "user", "content": text}] for text in PROMPTS]


def run(prompts: Any = PROMPTS, **options: Any) -> list[Generation]:
    options = {"max_new_tokens": 12, "tokenizer": make_tokenizer(), **options}
    return generate(options.pop("model", None) or make_model(), prompts, **options)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_samples_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    assert run(n=3, batch_size=batch_size) == run(n=3, batch_size=5)


def test_samples_do_not_depend_on_the_other_prompts_or_on_n() -> None:
    every = {(str(each.prompt), each.index): each for each in run(n=3)}
    for each in run([PROMPTS[2], PROMPTS[0]], n=2):
        assert each == every[str(each.prompt), each.index]


def test_samples_of_a_prompt_differ_and_so_do_seeds() -> None:
    made = run(n=3)
    assert len({each.completion for each in made if each.prompt == PROMPTS[0]}) == 3
    assert [each.completion for each in made] != [each.completion for each in run(n=3, seed=1)]


def test_result_lists_prompts_in_order_each_with_its_samples() -> None:
    made = run(n=2, batch_size=3)
    assert [each.prompt for each in made] == [p for p in PROMPTS for _ in range(2)]
    assert [each.index for each in made] == [0, 1] * len(PROMPTS)


def test_noise_of_own_streams_samples_the_softmax() -> None:
    scores = torch.tensor([1.0, 0.0, -1.0, 2.0, -30.0])
    rows, calls = 50, 100
    streams = OwnStreams([stream_seed(0, "prompt", index) for index in range(rows)])
    batch = scores.expand(rows, -1)
    drawn = torch.stack([streams(batch[:, :0].long(), batch).argmax(-1) for _ in range(calls)])
    got = torch.bincount(drawn.flatten(), minlength=5) / drawn.numel()
    want = scores.softmax(0)
    error = (want * (1 - want) / drawn.numel()).sqrt()
    assert ((got - want).abs() <= 5 * error + 1e-9).all(), (got, want)


def test_temperature_zero_is_transformers_greedy_search() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    for each in run(model=model, temperature=0):
        ids = tokenizer(each.prompt, return_tensors="pt").input_ids
        want = model.generate(ids, do_sample=False, max_new_tokens=12)
        alone = tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True)
        assert each.completion.strip() == alone.strip()


def test_low_temperature_top_k_and_top_p_approach_greedy_search() -> None:
    greedy = run(temperature=0)
    assert run(temperature=1e-4) == run(top_k=1) == run(top_p=1e-6) == greedy
    assert run() != greedy


def test_generation_config_of_the_model_does_not_change_what_is_sampled() -> None:
    model = make_model()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    model.generation_config.max_length = 3
    before = copy.deepcopy(model.generation_config)
    assert run(model=model) == run()
    assert model.generation_config == before


def test_completion_ends_at_the_end_token_or_is_marked_as_cut() -> None:
    made = run(n=8, max_new_tokens=40)
    assert {each.truncated for each in made} == {True, False}
    assert all(each.num_tokens == 40 for each in made if each.truncated)
    assert all(each.num_tokens < 40 for each in made if not each.truncated)
    assert not any("<eos>" in each.completion for each in made)


def test_every_end_token_of_the_generation_config_ends_a_text() -> None:
    model = make_model()
    first = next(each for each in run(model=model, temperature=0) if each.num_tokens > 2)
    ids = make_tokenizer()(first.completion.split()[0])["input_ids"]
    model.generation_config.eos_token_id = [1, ids[0]]
    again = run([first.prompt], model=model, temperature=0)[0]
    assert (again.num_tokens, again.truncated) == (1, False)


def test_messages_are_put_through_the_chat_template() -> None:
    tokenizer = make_tokenizer()
    texts = [f"<user> {prompt} <eos> <bot> " for prompt in PROMPTS]
    by_template, by_hand = run(CHAT, tokenizer=tokenizer), run(texts, tokenizer=tokenizer)
    assert [e.completion for e in by_template] == [e.completion for e in by_hand]
    assert by_template[0].prompt == CHAT[0]


def test_model_object_is_left_in_the_mode_and_state_it_had() -> None:
    model = make_model().train()
    model.config.use_cache = False
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    run(model=model)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert torch.equal(torch.get_rng_state(), state)


def test_folder_and_object_give_the_same(folder: pathlib.Path) -> None:
    assert generate(folder, PROMPTS, max_new_tokens=12) == run()


def test_adapter_folder_brings_its_base_model_along(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model = lora_model()
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    want = run(model=model)
    assert generate(tmp_path / "adapter", PROMPTS, max_new_tokens=12) == want
    assert generate(folder, PROMPTS, adapter=tmp_path / "adapter", max_new_tokens=12) == want
    assert want != run()
    with pytest.raises(ValueError, match="must not be an adapter"):
        generate(tmp_path / "adapter", PROMPTS, adapter=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -0.5}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 0, "n": 2}, "n must be 1 with temperature 0"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["who", ""]}, "prompt 1 must not be empty"),
        ({"max_new_tokens": 60}, "prompt 2 has 10 tokens"),
        ({"adapter": "folder"}, "adapter goes with a model that is named"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_one_text_instead_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Pass \[prompt\]"):
        run("who sees a tree ?")


def test_messages_without_chat_template_and_model_without_tokenizer_are_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="need a tokenizer with a chat template"):
        run(CHAT, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="Pass tokenizer=tokenizer"):
        generate(make_model(), PROMPTS)


def test_unknown_dtype_is_refused(folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of auto, float32"):
        generate(folder, PROMPTS, dtype="int8")


# Files ------------------------------------------------------------------------------------------


def test_generations_survive_a_file(tmp_path: pathlib.Path) -> None:
    made = [*run(n=2), Generation(CHAT[0], "a\u2028b\n```c", 3, 4, True)]
    write_generations(tmp_path / "deep" / "a.jsonl", made)
    assert read_generations(tmp_path / "deep" / "a.jsonl") == made
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.jsonl"]


def test_page_shows_every_prompt_once_and_a_fence_that_holds() -> None:
    page = as_markdown([Generation("p", "```x```", 0, 5), Generation("p", "y", 1, 1, True)], "T")
    assert page.count("## Prompt") == 1
    assert "````text\n```x```\n````" in page
    assert "**Sample 1**, 1 tokens, cut there:" in page


def test_prompts_are_read_from_preferences_text_and_json(tmp_path: pathlib.Path) -> None:
    rows = [{"prompt": "a\u2028b", "chosen": "x"}, {"prompt": CHAT[0]}, {"prompt": "a\u2028b"}]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "p.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "p.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "p.txt").write_text("one\n\ntwo\none\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.jsonl") == ["a\u2028b", CHAT[0]]  # each once
    assert read_prompts(tmp_path / "p.json") == ["a\u2028b", CHAT[0]]
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]
    assert read_prompts(tmp_path / "p.txt", limit=1) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"text": "b"}\n',
            "line 2: a row must have a prompt, a text or",
        ),
        ("p.jsonl", '{"prompt": "a"}\nnonsense\n', "line 2: must be JSON"),
        ("p.jsonl", '{"prompt": [{"content": "b"}]}\n', "line 1: a row must have a prompt"),
        ("p.jsonl", '{"chosen": "a", "rejected": "b"}', "line 1"),
        ("p.txt", "\n \n", "has no prompt"),
        ("p.md", "a", "must end in .jsonl"),
    ],
)
def test_files_without_prompts_are_refused_with_the_line(
    tmp_path: pathlib.Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_prompts_are_read_from_every_form_of_preference_data(tmp_path: pathlib.Path) -> None:
    turns = [{"from": "human", "value": "Hi"}]
    answers = {name: {"from": "gpt", "value": name} for name in ("chosen", "rejected")}
    (tmp_path / "s.json").write_text(json.dumps([{"conversations": turns, **answers}]))
    transcripts = {name: f"\n\nHuman: Hi\n\nAssistant: {name}" for name in ("chosen", "rejected")}
    (tmp_path / "h.jsonl").write_text(json.dumps(transcripts))
    assert read_prompts(tmp_path / "s.json") == [[{"role": "user", "content": "Hi"}]]
    assert read_prompts(tmp_path / "h.jsonl") == [[{"role": "user", "content": "Hi"}]]


def test_generations_without_completion_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: completion must be a text"):
        read_generations(tmp_path / "a.jsonl")


def test_missing_transformers_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'needs transformers; pip install "fusedpo\[tools\]"'):
        generate("model", PROMPTS)


# The command ------------------------------------------------------------------------------------


def test_command_writes_generations_and_a_page(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    output = tmp_path / "out.jsonl"
    arguments = ["generate", str(tmp_path / "p.txt"), "--model", str(folder), "--n", "2"]
    arguments += ["--max-new-tokens", "12", "--limit", "3", "--output", str(output)]
    assert cli.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert read_generations(output) == run(PROMPTS[:3], n=2)
    assert (report["prompts"], report["completions"]) == (3, 6)
    assert report["tokens"] == sum(each.num_tokens for each in read_generations(output))
    assert (tmp_path / "out.md").read_text(encoding="utf-8").count("## Prompt") == 3


def test_command_tells_what_is_wrong(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "p.txt", "--model", str(folder), "--output", "out.txt"]
    assert cli.main(arguments) == 1
    assert "fusedpo generate: output must end in .jsonl; got out.txt." in capsys.readouterr().err


def test_command_writes_over_no_prompts_and_no_page_of_another(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, notes = tmp_path / "p.jsonl", tmp_path / "q.md"
    prompts.write_text(json.dumps({"prompt": PROMPTS[0]}) + "\n", encoding="utf-8")
    notes.write_text("# Notes\n", encoding="utf-8")
    before = prompts.read_bytes()
    arguments = ["generate", str(prompts), "--model", str(folder), "--max-new-tokens", "4"]
    same = str(tmp_path / "." / "x" / ".." / "p.jsonl")
    assert cli.main([*arguments, "--output", same]) == 1
    assert "another file than the prompts" in capsys.readouterr().err
    assert cli.main([*arguments, "--output", str(tmp_path / "q.jsonl")]) == 1
    assert "q.md alone" in capsys.readouterr().err
    assert prompts.read_bytes() == before
    assert notes.read_text(encoding="utf-8") == "# Notes\n"
    for _ in range(2):  # what it made itself it makes anew
        assert cli.main([*arguments, "--output", str(tmp_path / "r.jsonl")]) == 0


def test_progress_is_told_after_each_batch() -> None:
    told: list[tuple[int, int]] = []
    run(n=2, batch_size=3, progress=lambda made, all_: told.append((made, all_)))
    assert told == [(3, 8), (6, 8), (8, 8)]
