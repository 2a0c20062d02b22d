"""Rounds of sample, judge, train: what a round takes from the one before, schedules, refusals."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import judges
import pytest

pytest.importorskip("trl", reason="iterate trains with TRL")
pytest.importorskip("rapidfuzz", reason="near-duplicates need rapidfuzz")

from fusedpo import RefStore, cli
from fusedpo.tools.iterate import IterateReport, iterate
from fusedpo.tools.iterate.training import last_checkpoint, scheduled, train_round
from fusedpo.tools.sampling import Sampling
from iterate_kills import CONFIG
from precompute_helpers import write_inputs
from trl_helpers import one_thread  # noqa: F401  a fixture

PROMPTS = ["who sees a tree ?", "who likes the river ?"]
SAMPLING = Sampling(n=3, max_new_tokens=40, temperature=1.5, batch_size=6)
SHORT = {**CONFIG, "max_steps": 1}
del SHORT["learning_rate"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_inputs(tmp_path_factory.mktemp("inputs"), rows=4).model


def arguments(model: str, output: pathlib.Path, **changed: Any) -> dict[str, Any]:
    same: dict[str, Any] = {"prompts": PROMPTS, "model": model, "judge": judges.longer}
    same |= {"config": SHORT, "output": output, "rounds": 2, "sampling": SAMPLING}
    return same | changed


@pytest.fixture(scope="module")
def run(model: str, tmp_path_factory: pytest.TempPathFactory) -> IterateReport:
    output = tmp_path_factory.mktemp("run") / "out"
    return iterate(**arguments(model, output, beta=[0.1, 0.05], learning_rate=[1e-3, 2e-3]))


def trained(run: IterateReport, number: int) -> dict[str, Any]:
    path = pathlib.Path(run.output, f"round-{number}", "training", "report.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_each_round_trains_on_the_policy_and_pairs_of_its_own(
    run: IterateReport, model: str
) -> None:
    first, second = trained(run, 1)["run"], trained(run, 2)["run"]
    assert first["model"] == model
    assert second["model"] == str(pathlib.Path(run.output, "round-1", "training"))
    assert second["data"]["dataset_name"] == str(pathlib.Path(run.output, "round-2/pairs.jsonl"))
    assert run.model == str(pathlib.Path(run.output, "round-2", "training"))
    samples = [
        pathlib.Path(run.output, f"round-{i}", "samples.jsonl").read_text() for i in (1, 2, 3)
    ]
    assert len(set(samples)) == 3


def test_schedules_reach_the_trainings(run: IterateReport) -> None:
    told = [trained(run, number)["run"]["arguments"] for number in (1, 2)]
    assert [each["beta"] for each in told] == [0.1, 0.05]
    assert [each["learning_rate"] for each in told] == [1e-3, 2e-3]
    assert [each.beta for each in run.rounds] == [0.1, 0.05, None]


def test_each_round_has_a_reference_store_of_its_own(run: IterateReport) -> None:
    stores = [
        RefStore(path.parent)
        for number in (1, 2)
        for path in pathlib.Path(run.output, f"round-{number}").rglob("identity.json")
    ]
    assert len(stores) == 2
    assert stores[0].identity["model"] != stores[1].identity["model"]


def test_the_report_follows_the_samples_over_the_rounds(run: IterateReport) -> None:
    assert [each.number for each in run.rounds] == [1, 2, 3]
    assert run.rounds[0].pathologies.length_ratio == 1.0
    assert "verbosity" in run.rounds[2].pathologies.counts
    assert run.rounds[2].pairs is None
    kept = json.loads(pathlib.Path(run.output, "report.json").read_text())
    assert kept == json.loads(json.dumps(run.as_dict()))
    import rich.console

    console = rich.console.Console(width=100)
    with console.capture() as shown:
        console.print(run.render())
    assert "times round 1" in shown.get()
    assert "0.05" in shown.get()


def test_one_more_round_goes_on_from_the_last(
    run: IterateReport, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedpo.tools.iterate import training

    calls = []
    original = training.train
    monkeypatch.setattr(
        training, "train", lambda *args, **more: calls.append(more) or original(*args, **more)
    )
    before = pathlib.Path(run.output, "round-3", "samples.jsonl").read_bytes()
    output = pathlib.Path(run.output)
    more = {"rounds": 3, "beta": [0.1, 0.05, 0.02], "learning_rate": [1e-3, 2e-3, 1e-3]}
    again = iterate(**arguments(model, output, **more))
    assert len(calls) == 1
    assert (output / "round-3/samples.jsonl").read_bytes() == before
    assert (
        again.rounds[:2]
        == tuple(
            type(each)(**{**vars(each), "pairs": found.pairs})
            for each, found in zip(run.rounds, again.rounds, strict=False)
        )[:2]
    )
    with pytest.raises(ValueError, match=r"round-1 was trained with another beta: \[0.1\]"):
        iterate(**arguments(model, output, **more | {"beta": 0.3}))


def refuse(prompt: str, first: str, second: str) -> str:
    raise AssertionError("nobody is to be asked")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"beta": [0.1]}, "one for each of 2 rounds; got 1"),
        ({"beta": 0.1, "config": {**SHORT, "beta": 0.2}}, "beta must be either"),
        ({"config": {**SHORT, "model_name": "m"}}, "must not have model_name"),
        ({"config": {**SHORT, "ref_store": "refs"}}, "must not have ref_store"),
        ({"config": {**SHORT, "learning_rte": 1.0}}, "learning_rte"),
        ({"sampling": Sampling(n=1)}, "at least 2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sampled(
    tmp_path: pathlib.Path, changed: dict[str, Any], told: str
) -> None:
    same = arguments("no such model", tmp_path / "o", judge=refuse)
    with pytest.raises(ValueError, match=told):
        iterate(**(same | changed))
    assert not (tmp_path / "o").exists()


def test_a_round_without_a_pair_is_an_error(model: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"no pair to train on.*2 are undecided"):
        iterate(**arguments(model, tmp_path / "o", judge=judges.first))


def test_a_schedule_is_one_number_or_one_for_each_round() -> None:
    assert scheduled("beta", 0.1, 3) == [0.1, 0.1, 0.1]
    assert scheduled("beta", [0.3, 0.2, 0.1], 3) == [0.3, 0.2, 0.1]
    assert scheduled("beta", None, 2) == [None, None]


def test_a_checkpoint_that_a_kill_tore_is_passed_over(tmp_path: pathlib.Path) -> None:
    for number, state, optimizer in ((9, "{}", True), (10, "{}", True), (11, "{", True)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
        if optimizer:
            (folder / "optimizer.pt").touch()
    (tmp_path / "checkpoint-12").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "nothing") is None


def test_a_round_with_nothing_but_a_torn_checkpoint_begins_again(
    model: str, tmp_path: pathlib.Path
) -> None:
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "training" / "checkpoint-1").mkdir(parents=True)
    options = {"strategy": "dpo", "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    config = {**options, "model_name": model, "dataset": str(pairs)}
    assert train_round(tmp_path, config)["metrics"]["train_loss"] > 0
    assert not list(tmp_path.glob("training/checkpoint-*"))


def test_the_command_iterates(
    model: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, config = tmp_path / "prompts.jsonl", tmp_path / "train.json"
    prompts.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in PROMPTS))
    config.write_text(json.dumps(SHORT))
    options = ["--model", model, "--judge", "judges:longer", "--output", tmp_path / "o", "--json"]
    options += ["--n", 3, "--max-new-tokens", 40, "--temperature", 1.5, "--rounds", 1]
    options += ["--config", config, "--beta", "0.2"]
    assert cli.main([*map(str, ["iterate", prompts, *options])]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [each["beta"] for each in report["rounds"]] == [0.2, None]
    assert cli.main([*map(str, ["iterate", prompts, *options, "--beta", "x"])]) == 1
    assert "--beta must be a number" in capsys.readouterr().err
