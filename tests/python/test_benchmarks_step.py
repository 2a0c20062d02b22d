"""The benchmark of whole training steps: what is compared, and what is timed.

The contestants train a tiny model here; nothing says how fast anything is.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="one of the contestants is TRL's")

from step_runs import (
    ENVIRONMENT,
    LOGGED,
    case,
    needs_project,
    project_on_path,  # noqa: F401  a fixture
    run_of,
)
from trl_helpers import make_model, make_pairs, make_tokenizer, one_thread  # noqa: F401

pytestmark = [needs_project, pytest.mark.usefixtures("project_on_path")]


# ---- logs ---------------------------------------------------------------------------------------

ALLOWED = {"": 1e-2, "logps/": 1e-3, "loss": 1e-1}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.0),
        ({"entropy": 4.02}, 0.5),  # relative, and the limit of everything without its own
        ({"logps/chosen": -200.4}, 2.0),  # a limit of its own
        ({"loss": 0.55}, 1.0),
        ({"rewards/margins": -0.03}, 3.0),  # absolute: it starts at 0
        ({"entropy": 4.02, "loss": 0.6}, 2.0),  # the worst of all
        ({"rewards/accuracies": 1.0, "learning_rate": 1.0, "epoch": 9.0}, 0.0),
        ({"of ours only": 5.0}, 0.0),
    ],
)
def test_difference_of_logs_is_a_multiple_of_what_is_allowed(changes, expected):
    from benchmarks.dpo_step import worst_difference

    logs = [LOGGED, LOGGED | changes]
    assert worst_difference(logs, [LOGGED, LOGGED], ALLOWED) == pytest.approx(expected)


def test_steps_and_values_that_are_not_logged_are_no_agreement():
    from benchmarks.dpo_step import worst_difference

    with pytest.raises(ValueError, match="longer"):
        worst_difference([LOGGED], [LOGGED, LOGGED], ALLOWED)
    without = {name: value for name, value in LOGGED.items() if name != "entropy"}
    with pytest.raises(KeyError, match="entropy"):
        worst_difference([without], [LOGGED], ALLOWED)


# ---- ratios -------------------------------------------------------------------------------------


def test_ratios_are_those_of_trl_and_24_layers_those_of_the_missing_backbone():
    from benchmarks import dpo_step

    trl, ours = run_of(), run_of(4.0, 1.0, 200, 1e9)
    dpo_step.compare(ours, trl, case())
    assert ours["faster"] == 2.5
    assert ours["backbone_faster"] == ours["fewer_tokens"] == 4.0
    assert ours["memory_share"] == 0.25
    assert ours["step_of_24_layers_s"] == 4.0 + 5 * 1.0  # 20 layers more than the 4 measured
    assert ours["faster_with_24_layers"] == (10.0 + 5 * 4.0) / 9.0
    assert "2.50x" in dpo_step.line(ours)
    assert "24 layers    9.00 s (3.33x)" in dpo_step.line(ours)
    # With all weights trained the optimizer's time depends on the layers, too.
    trl, ours = run_of(), run_of(4.0)
    dpo_step.compare(ours, trl, case(train="full"))
    assert ours["faster"] == 2.5
    assert not any("24" in name for name in ours)
    assert "24 layers" not in dpo_step.line(ours)


def measured(monkeypatch, runs):
    """A case whose contestants gave `runs`."""
    from benchmarks import dpo_step

    def child(_case, what, _folder):
        return {"construction_and_scoring_s": 1.0} if what == "store" else runs[what]

    monkeypatch.setattr(dpo_step, "child", child)
    return dpo_step.measure(case(data="/somewhere/pairs.jsonl"), list(runs))


def test_contestant_whose_logs_differ_is_wrong_and_has_no_time(monkeypatch, capsys):
    runs = {"trl": run_of(), "patch": run_of(2.0, entropy=4.1), "shared+store": run_of(1.0)}
    found = measured(monkeypatch, runs)
    assert found["case"]["data"] == "pairs.jsonl"  # no folder of this machine
    assert "store" in found
    assert found["runs"]["trl"]["faster"] == 1.0
    assert found["runs"]["shared+store"]["faster"] == 10.0
    wrong = found["runs"]["patch"]
    assert wrong["difference"] == pytest.approx(0.025 / 2e-4)
    assert not {"step", "faster", "memory_share"} & wrong.keys()
    assert "patch         WRONG: 125.0 times" in capsys.readouterr().out


def test_half_precision_must_agree_with_trl_at_that_precision_or_in_fp32(monkeypatch, capsys):
    from benchmarks import dpo_step

    # What may differ is 0.08 here; TRL is 0.06 above its own value in fp32, which is 4.
    runs = {"trl": run_of(entropy=4.06), "patch": run_of(entropy=4.1), "fused": run_of(2.0)}
    runs |= {"shared": run_of(2.0, entropy=3.96), "shared+store": run_of(2.0, entropy=3.8)}
    asked = []

    def child(each, what, _folder):
        asked.append((each.dtype, what))
        return json.loads(json.dumps(run_of() if each.dtype == "fp32" else runs.get(what, {})))

    monkeypatch.setattr(dpo_step, "child", child)
    found = dpo_step.measure(case(dtype="amp"), list(runs))["runs"]
    scale = 4.06 * 2e-2
    from_trl = {"trl": 0, "patch": 0.04, "fused": 0.06, "shared": 0.1, "shared+store": 0.26}
    for name, run in found.items():
        assert run["difference"] == pytest.approx(from_trl[name] / scale)
    from_fp32 = {
        name: each["difference_from_fp32"]
        for name, each in found.items()
        if "difference_from_fp32" in each
    }
    assert from_fp32 == pytest.approx({"shared": 0.5, "shared+store": 2.5})
    assert "shared+store  WRONG: 2.5 times" in capsys.readouterr().out
    assert [name for name, run in found.items() if "step" not in run] == ["shared+store"]
    assert asked.count(("fp32", "trl")) == 1  # the first time that it is needed

    asked.clear()
    again = dpo_step.measure(case(dtype="amp"), list(runs), [LOGGED])["runs"]
    assert [run["difference"] for run in again.values()] == [
        run["difference"] for run in found.values()
    ]
    assert ("fp32", "trl") not in asked


def test_contestant_that_multiplies_in_another_type_is_wrong_though_its_logs_agree(
    monkeypatch, capsys
):
    runs = {"trl": run_of(), "shared": run_of(1.0) | {"products": ["bfloat16"]}}
    found = measured(monkeypatch, runs)["runs"]
    assert found["shared"]["difference"] == 0
    assert "step" not in found["shared"]
    told = "shared        WRONG: its layers multiply in ['bfloat16'], TRL's in ['float32']"
    assert told in capsys.readouterr().out


# ---- cases of an earlier run --------------------------------------------------------------------


def test_earlier_cases_are_of_one_machine(tmp_path):
    from benchmarks.dpo_step import earlier

    path = tmp_path / "dpo_step.json"
    assert earlier(path, ENVIRONMENT) == []
    path.write_text(json.dumps({"environment": ENVIRONMENT, "cases": [{"file": "a"}]}))
    later = ENVIRONMENT | {"date": "2026-01-02T00:00:00+00:00", "cpus": 1, "gpu": None}
    later["commit"] = "fedcba"
    assert earlier(path, later) == [{"file": "a", "commit": ENVIRONMENT["commit"]}]
    cases = [{"file": "a", "commit": "abc"}]
    path.write_text(json.dumps({"environment": ENVIRONMENT, "cases": cases}))
    assert earlier(path, later) == cases
    for name, other in (
        ("threads", 1),
        ("versions", {"torch": "2.14.0"}),
        ("gpu", {"name": "A card"}),
    ):
        told = "card" if name == "gpu" else name
        with pytest.raises(SystemExit, match=f"measured with another {told}: give another"):
            earlier(path, ENVIRONMENT | {name: other})


def test_added_cases_replace_their_own_and_leave_the_others(monkeypatch, tmp_path):
    from benchmarks import dpo_step

    path = tmp_path / "dpo_step.json"
    seen, known = [], []

    def measure(each, _contestants, exact):
        known.append(exact)
        seen.append(len(json.loads(path.read_text())["cases"]) if path.exists() else 0)
        names = {"data": f"{each.data.rsplit('/', 1)[1]}"}
        return {"case": each._asdict() | names, "runs": {"trl": run_of(len(seen))}}

    monkeypatch.setattr(dpo_step, "measure", measure)
    environment = dict(ENVIRONMENT)
    monkeypatch.setattr(dpo_step.common, "environment", lambda: dict(environment))

    def run(*arguments):
        options = ["--data", str(tmp_path), "--tokenizer", "t", "--output", str(path), "--batch"]
        dpo_step.main([*options, "4", "--train", "lora", *arguments])
        cases = json.loads(path.read_text())["cases"]
        return [
            (c["file"], c["case"]["dtype"], c["runs"]["trl"]["step"]["median_s"]) for c in cases
        ]

    assert run("--files", "a", "b", "--dtype", "fp32") == [("a", "fp32", 1), ("b", "fp32", 2)]
    assert seen == [0, 1]  # written after each case
    environment["commit"] = "fedcba"
    added = run("--add", "--files", "a", "--dtype", "fp32", "amp")
    assert added == [("b", "fp32", 2), ("a", "fp32", 3), ("a", "amp", 4)]
    assert known == [None, None, None, [LOGGED]]  # the last has a twin in fp32
    commits = [each["commit"] for each in json.loads(path.read_text())["cases"]]
    assert commits == [ENVIRONMENT["commit"], "fedcba", "fedcba"]
    run("--add", "--files", "b", "--dtype", "amp")
    assert known[4:] == [None]  # its twin is of another commit
    run("--add", "--files", "a", "--dtype", "amp")
    assert known[5:] == [[LOGGED]]
    assert run("--files", "b", "--dtype", "amp") == [("b", "amp", 7)]
    assert "rehearsal" not in json.loads(path.read_text())
    run("--rehearse", "--files", "b", "--dtype", "amp")
    assert json.loads(path.read_text())["rehearsal"]
    with pytest.raises(SystemExit):
        run("--contestants", "patch", "trl")


# ---- the clock ----------------------------------------------------------------------------------


class TimedLayer(torch.nn.Module):
    """Takes one second forward and two backward on a clock that nobody waits for."""

    def __init__(self, clock):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.clock = clock

    def forward(self, x):
        self.clock.seconds += 1.0
        y = x * self.weight
        if y.requires_grad:
            y.grad_fn.register_hook(self._backward)
        return y

    def _backward(self, *_):
        self.clock.seconds += 2.0


def test_clock_counts_the_layers_of_policy_and_reference_and_the_policys_tokens(monkeypatch):
    from benchmarks import dpo_step_run

    time = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(dpo_step_run, "now", lambda: time.seconds)
    policy, reference = (
        SimpleNamespace(layers=[TimedLayer(time) for _ in range(3)]) for _ in range(2)
    )
    clock = dpo_step_run.Clock(3)
    clock.watch(policy)
    clock.watch(reference)

    def forward(model):
        hidden = torch.ones(2, 5, 4)
        for layer in model.layers:
            hidden = layer(hidden)
        return hidden

    with torch.no_grad():
        forward(policy)  # before the first step: what scores the reference for a store
    assert not clock.steps
    for _ in range(2):
        clock.on_step_begin()
        time.seconds += 100.0  # elsewhere
        hidden = forward(policy)
        with torch.no_grad():
            forward(reference)
        time.seconds += 1000.0
        hidden.sum().backward()
        clock.on_step_end()
    # 3 s forward, 6 s backward, 3 s of the reference; 2 x 5 tokens with a gradient.
    assert clock.steps == [1112.0, 1112.0]
    assert clock.backbone == pytest.approx([12.0, 12.0])
    assert clock.tokens == [10, 10]


# ---- all of it ----------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Contestants train a tiny model in this process; a folder with data and a tokenizer."""
    from benchmarks import dpo_step, dpo_step_run

    monkeypatch.setattr(dpo_step_run, "make_model", lambda *_: make_model())

    def child(each, what, folder):
        if what == "store":
            return dpo_step_run.make_store(each, folder)
        return json.loads(json.dumps(dpo_step_run.run(each, what, folder)))

    monkeypatch.setattr(dpo_step, "child", child)
    rows = [json.dumps(row) for row in make_pairs(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


@pytest.mark.usefixtures("one_thread")
def test_all_contestants_train_alike_and_each_target_finds_its_figure(tiny, monkeypatch):
    from benchmarks import dpo_step, judge, targets_step

    path = tiny / "dpo_step.json"
    options = ["--data", str(tiny), "--tokenizer", str(tiny / "tokenizer"), "--files", "pairs"]
    options += ["--batch", "4", "--dtype", "fp32", "--layers", "2", "--steps", "2"]
    dpo_step.main([*options, "--output", str(path)])
    content = json.loads(path.read_text())
    assert [each["case"]["train"] for each in content["cases"]] == ["lora", "full"]
    for each in content["cases"]:
        runs = each["runs"]
        assert all(run["difference"] <= 1 for run in runs.values())
        assert all(run["products"] == ["float32"] for run in runs.values())
        computed = {name: run["tokens"]["computed"] for name, run in runs.items()}
        assert computed["trl"] == computed["patch"] == computed["fused+store"]
        assert computed["shared"] == computed["shared+store"] < 0.8 * computed["trl"]
        assert all(run["backbone_s"] > 0 for run in runs.values())
    monkeypatch.setattr(targets_step, "FILES", ("pairs",))
    rows = judge.rows(targets_step.targets({"dpo_step": content}), {"dpo_step": content})
    figures = [row for row in rows if row["measured"] is not None]
    assert len(figures) == 2 * len(targets_step.KINDS)


@pytest.mark.usefixtures("one_thread")
def test_contestants_multiply_in_half_precision_under_autocast(tiny):
    from benchmarks import dpo_step

    path = tiny / "dpo_step.json"
    options = ["--data", str(tiny), "--tokenizer", str(tiny / "tokenizer"), "--files", "pairs"]
    options += ["--batch", "4", "--dtype", "amp", "--layers", "2", "--steps", "1"]
    options += ["--train", "lora", "--contestants", "trl", "fused", "shared"]
    dpo_step.main([*options, "--output", str(path)])
    (found,) = json.loads(path.read_text())["cases"]
    assert [run["products"] for run in found["runs"].values()] == [["bfloat16"]] * 3
