"""Pairs out of prompts: who answers, what is left out, which two are taken, and what is kept."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import judges
import pytest

pytest.importorskip("trl", reason="the tiny model is made by TRL's helpers")
pytest.importorskip("httpx", reason="asking a server needs httpx")
pytest.importorskip("rapidfuzz", reason="near-duplicates need rapidfuzz")

from fusedpo import cli
from fusedpo.tools.generate import Generation
from fusedpo.tools.judge import Comparison, Endpoint, EndpointError
from fusedpo.tools.pairs import make_pairs, samples
from fusedpo.tools.pairs.choosing import Candidates, candidates, choose
from fusedpo.tools.sampling import Sampling
from misbehaving_server import Payload, serve, status
from precompute_helpers import write_inputs
from trl_helpers import one_thread  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["who sees a tree ?", "who likes the river ?", "who paints his red hat ?"]
SAMPLING = Sampling(n=3, max_new_tokens=40, temperature=1.5, batch_size=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_inputs(tmp_path_factory.mktemp("inputs"), rows=4).model


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts of each call of `generate`."""
    calls: list[Any] = []
    original = samples.generate

    def spy(model: Any, prompts: Any, **options: Any) -> Any:
        calls.append(list(prompts))
        return original(model, prompts, **options)

    monkeypatch.setattr(samples, "generate", spy)
    return calls


def rows_of(path: pathlib.Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def group(*texts: str) -> Candidates:
    return Candidates("p", [Generation("p", text, i) for i, text in enumerate(texts)])


def judged(candidates_: Candidates, verdict: Callable[[str, str, str], str]) -> list[Comparison]:
    from fusedpo.tools.judge import ReplyCache, compare

    return compare(candidates_.questions, verdict, ReplyCache(None), keep=False).comparisons


def test_pairs_are_the_longest_and_the_shortest_for_a_judge_of_length(
    model: str, tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "out"
    report = make_pairs(PROMPTS, model=model, judge=judges.longer, output=output, sampling=SAMPLING)
    rows, sampled = rows_of(output / "pairs.jsonl"), rows_of(output / "samples.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    assert (report.prompts, report.samples, report.pairs) == (3, 9, len(rows))
    for row in rows:
        answers = [s["completion"] for s in sampled if s["prompt"] == row["prompt"]]
        lengths = [len(answer) for answer in answers if answer.strip()]
        assert len(row["chosen"]) == max(lengths)
        assert len(row["rejected"]) == min(lengths)
        told = row["provenance"]
        assert (
            sampled[PROMPTS.index(row["prompt"]) * 3 + told["chosen_sample"]]["completion"]
            == (row["chosen"])
        )
        assert told["model"] == model
        assert (told["judge"], told["seed"], told["temperature"]) == ("longer", 0, 1.5)
        assert told["chosen_score"] > told["rejected_score"]
    assert report.longer_chosen == 1.0
    assert report.flip_rate == 0.0


def test_a_second_run_samples_and_asks_nothing(
    model: str, tmp_path: pathlib.Path, generated: list[Any]
) -> None:
    arguments: dict[str, Any] = {"model": model, "output": tmp_path / "o", "sampling": SAMPLING}
    first = make_pairs(PROMPTS, judge=judges.longer, **arguments)
    content = (tmp_path / "o/pairs.jsonl").read_bytes()
    calls = len(generated)
    second = make_pairs(PROMPTS, judge=judges.longer, **arguments)
    assert len(generated) == calls > 0
    assert (first.sampled, first.cached) == (9, 0)
    assert first.asked > 0
    assert (second.sampled, second.asked, second.cached) == (0, 0, first.asked)
    assert (tmp_path / "o/pairs.jsonl").read_bytes() == content


def test_another_judge_looks_at_the_same_samples(
    model: str, tmp_path: pathlib.Path, generated: list[Any]
) -> None:
    arguments: dict[str, Any] = {"model": model, "output": tmp_path / "o", "sampling": SAMPLING}
    make_pairs(PROMPTS, judge=judges.longer, **arguments)
    calls = len(generated)
    report = make_pairs(PROMPTS, judge=judges.first, **arguments)
    assert len(generated) == calls
    assert (report.pairs, report.undecided, report.flip_rate) == (0, 3, 1.0)
    assert (tmp_path / "o/pairs.jsonl").read_text() == ""


@pytest.mark.parametrize("cut", [1, 200, 400])
def test_a_file_of_samples_that_a_kill_tore_is_completed_alike(
    model: str, tmp_path: pathlib.Path, generated: list[Any], cut: int
) -> None:
    one_in_a_chunk = Sampling(n=3, max_new_tokens=40, temperature=1.5, batch_size=1)
    arguments: dict[str, Any] = {"model": model, "judge": judges.longer}
    arguments |= {"output": tmp_path / "o", "sampling": one_in_a_chunk}
    make_pairs(PROMPTS, **arguments)
    path = tmp_path / "o/samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    generated.clear()
    make_pairs(PROMPTS, **arguments)
    assert path.read_bytes() == whole
    assert 1 <= len(generated) <= 2


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sampling": Sampling(n=2, max_new_tokens=40)}, "n was 3 and is 2"),
        ({"prompts": PROMPTS[:2]}, "prompts was"),
        ({"dtype": "bfloat16"}, "dtype was 'auto' and is 'bfloat16'"),
    ],
)
def test_a_folder_goes_on_with_the_same_settings_alone(
    model: str, tmp_path: pathlib.Path, changed: dict[str, Any], told: str
) -> None:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "model": model, "sampling": SAMPLING}
    arguments |= {"judge": judges.longer, "output": tmp_path / "o"}
    make_pairs(**arguments)
    with pytest.raises(ValueError, match=told):
        make_pairs(**(arguments | changed))


def test_a_prompt_that_is_too_long_is_named_before_sampling_and_can_be_corrected(
    model: str, tmp_path: pathlib.Path, generated: list[Any]
) -> None:
    one_in_a_chunk = Sampling(n=3, max_new_tokens=40, temperature=1.5, batch_size=1)
    arguments: dict[str, Any] = {"model": model, "judge": judges.longer}
    arguments |= {"output": tmp_path / "o", "sampling": one_in_a_chunk}
    with pytest.raises(ValueError, match="prompt 3 has"):
        make_pairs([*PROMPTS, "tree " * 5000], **arguments)
    assert not generated
    assert make_pairs(PROMPTS, **arguments).prompts == 3


def test_samples_that_are_not_of_a_run_are_left_alone(model: str, tmp_path: pathlib.Path) -> None:
    mine = tmp_path / "samples.jsonl"
    mine.write_text("mine\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl without one"):
        make_pairs(PROMPTS, model=model, judge=judges.longer, output=tmp_path, sampling=SAMPLING)
    assert mine.read_text() == "mine\n"


def test_a_model_that_was_trained_since_is_another_one(tmp_path: pathlib.Path, model: str) -> None:
    import shutil

    from transformers import AutoModelForCausalLM

    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    before = samples.model_identity(str(copy))
    shutil.move(copy, tmp_path / "moved")
    assert samples.model_identity(str(tmp_path / "moved")) == before
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    policy.get_output_embeddings().weight.data[0] += 1e-3
    policy.save_pretrained(tmp_path / "moved")
    assert samples.model_identity(str(tmp_path / "moved")) != before


def test_empty_answers_and_near_duplicates_are_left_out() -> None:
    texts = ["The cat sat on the mat.", "  ", "The cat sat on the mat!", "Another thing.", ""]
    (found,) = candidates([Generation("p", text, i) for i, text in enumerate(texts)], 5, 90.0)
    assert [each.index for each in found.kept] == [0, 3]
    assert (found.empty, found.near_duplicates) == (2, 1)
    (found,) = candidates([Generation("p", text, i) for i, text in enumerate(texts)], 5, 100.0)
    assert [each.index for each in found.kept] == [0, 2, 3]


def test_no_pair_is_made_where_the_judge_goes_by_the_order() -> None:
    answers = group("one", "three", "fourteen")
    assert choose(answers, judged(answers, judges.first)) is None


def test_the_widest_gap_is_taken_among_those_that_beat_one_another() -> None:
    answers = group("aaaa", "a", "aaa", "aa")
    choice = choose(answers, judged(answers, judges.longer))
    assert choice is not None
    assert (choice.chosen.completion, choice.rejected.completion) == ("aaaa", "a")
    assert (choice.chosen_score, choice.rejected_score) == (1.0, 0.0)


def test_the_best_and_the_worst_are_no_pair_if_they_tie_with_each_other() -> None:
    def hardly(prompt: str, first: str, second: str) -> str:
        if {first, second} == {"aaaa", "a"}:
            return "tie"
        return judges.longer(prompt, first, second)

    answers = group("aaaa", "a", "aaa", "aa")
    choice = choose(answers, judged(answers, hardly))
    assert choice is not None
    assert (choice.chosen.completion, choice.rejected.completion) == ("aaaa", "aa")


def test_replies_that_cannot_be_read_decide_nothing() -> None:
    answers = group("one", "three")
    comparisons = judged(answers, lambda prompt, first, second: "who knows")
    assert choose(answers, comparisons) is None


def reply(payload: Payload) -> str:
    asked = payload["messages"][-1]["content"]
    if "Judge" in asked:
        return "[[A]]" if asked.index("long") < asked.index("short") else "[[B]]"
    return f"a {'long ' * 9} answer" if payload["seed"] % 2 else "short, this is"


def test_a_server_answers_and_another_judges(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    chats = [
        [{"role": "system", "content": "Be."}, {"role": "user", "content": str(i)}]
        for i in (1, 2, 3)
    ]
    with serve(reply) as server:
        arguments: dict[str, Any] = {
            "model": Endpoint(server.url, "policy", body={"max_tokens": 9}, backoff=0.01),
            "judge": Endpoint(server.url, "referee", backoff=0.01),
            "template": "Judge. {prompt} {first} {second}",
            "sampling": Sampling(n=4, top_p=0.9, seed=5),
            "output": tmp_path / "o",
        }
        server.faults = [status(500), status(429)]
        report = make_pairs(chats, **arguments)
        asked = len(server.payloads)
        again = make_pairs(chats, **arguments)
        assert len(server.payloads) == asked
    sampled = [payload for payload in server.payloads if payload["model"] == "policy"]
    assert {tuple(m["role"] for m in payload["messages"]) for payload in sampled} == {
        ("system", "user")
    }
    assert {payload["top_p"] for payload in sampled} == {0.9}
    assert {payload["max_tokens"] for payload in sampled} == {9}
    assert len({payload["seed"] for payload in sampled}) == 12
    assert report.pairs == len(rows_of(tmp_path / "o/pairs.jsonl")) >= 1
    assert report.near_duplicates > 0
    assert (again.asked, again.sampled, again.pairs) == (0, 0, report.pairs)
    for row in rows_of(tmp_path / "o/pairs.jsonl"):
        assert row["chosen"][0]["role"] == "assistant"
        assert "long" in row["chosen"][0]["content"]
        assert "short" in row["rejected"][0]["content"]
        assert row["provenance"]["model"] == "policy"


def test_answers_of_a_server_that_failed_are_kept(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def until_the_fifth(payload: Payload) -> str:
        if len(server.payloads) == 5:
            server.faults.append(status(403))
        return reply(payload)

    with serve(until_the_fifth) as server:
        arguments: dict[str, Any] = {
            "model": Endpoint(server.url, "policy", body={}, concurrency=1),
            "judge": judges.longer,
            "sampling": Sampling(n=4),
            "output": tmp_path / "o",
        }
        with pytest.raises(EndpointError, match="403"):
            make_pairs(["x", "y"], **arguments)
        assert make_pairs(["x", "y"], **arguments).sampled == 3
        assert len(server.payloads) == 8 + 1


def unreachable(prompt: str, first: str, second: str) -> str:
    raise AssertionError("nobody is to be asked")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sampling": Sampling(n=1)}, "at least 2"),
        ({"near_duplicate": 0}, "near_duplicate"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["x", "y", "x"]}, '"x" is there twice'),
        ({"template": "{prompt}"}, "template"),
        (
            {"model": Endpoint("http://localhost:1/v1", "m"), "sampling": Sampling(n=2, top_k=5)},
            "top_k is unknown",
        ),
        (
            {"model": Endpoint("http://localhost:1/v1", "m", body={"temperature": 0.2})},
            "must not have 'temperature'",
        ),
        (
            {"prompts": ["x", [{"role": "assistant", "content": None, "tool_calls": []}]]},
            "prompt 1 must be a text or a list of messages",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sampled(
    tmp_path: pathlib.Path, options: dict[str, Any], told: str
) -> None:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "model": "no such model"}
    arguments |= {"judge": unreachable, "output": tmp_path / "o"}
    with pytest.raises(ValueError, match=told):
        make_pairs(**(arguments | options))
    assert not (tmp_path / "o").exists()


def test_a_judge_that_cannot_be_told_from_another_is_refused_at_once(
    tmp_path: pathlib.Path,
) -> None:
    class Referee:
        def __call__(self, prompt: str, first: str, second: str) -> str:
            return "A"

    with pytest.raises(TypeError, match="plain function"):
        make_pairs(PROMPTS, model="no such model", judge=Referee(), output=tmp_path / "o")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--batch-size", "4"], "--batch-size must come with a model that is loaded here"),
        (["--dtype", "auto"], "--dtype must come with a model that is loaded here"),
        (["--max-new-tokens", "9", "--model-body", "{}"], "--max-new-tokens must not come with"),
        (["--model-body", '{"temperature": 0, "max_tokens": 1024}'], "not have 'temperature'"),
        (["--model-body", '{"seed": 1}'], "not have 'seed'"),
        (["--top-k", "5"], "top_k"),
    ],
)
def test_the_command_refuses_what_a_server_would_not_get(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    command = ["pairs", str(prompts), "--model", "http://localhost:1/v1", "--served-model", "m"]
    command += ["--judge", "judges:longer", "--output", str(tmp_path / "o"), *options]
    assert cli.main(command) == 1
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o").exists()


def test_the_command_makes_pairs_that_precompute_reads(
    model: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = ["--model", model, "--judge", "judges:longer", "--output", tmp_path / "o", "--json"]
    options += ["--n", 3, "--max-new-tokens", 40, "--temperature", 1.5]
    assert cli.main([*map(str, ["pairs", prompts, *options])]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pairs"] == 3
    data = ["precompute", "--data", report["path"], "--model", model, "--output", tmp_path / "refs"]
    assert cli.main([*map(str, [*data, "--autocast", "no", "--json"])]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3
    assert cli.main(["pairs", str(prompts), *map(str, options), "--model-key", "K"]) == 1
    assert "--model-key must come with the address" in capsys.readouterr().err
