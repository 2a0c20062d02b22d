"""Targets and tables of the benchmark of whole training steps, from imaginary figures."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl", reason="dpo_step's contestants are trainers of TRL")

from step_runs import (
    ENVIRONMENT,
    imaginary_cases,
    needs_project,
    project_on_path,  # noqa: F401  a fixture
)

pytestmark = [needs_project, pytest.mark.usefixtures("project_on_path")]


# ---- targets ------------------------------------------------------------------------------------


def verdicts(content, title="pandalm-human, 4 pairs, LoRA, fp32"):
    from benchmarks import judge, targets_step

    runs = {} if content is None else {"dpo_step": content}
    rows = judge.rows(targets_step.targets(runs), runs)
    assert len({row["case"] for row in rows}) == len(rows)
    return [judge.verdict(row) for row in rows if row["cell"][0] == title], rows


def test_targets_of_steps_are_met_or_missed_by_their_figures(capsys):
    from benchmarks import judge

    found, rows = verdicts(imaginary_cases())
    assert found == ["met"] * 4
    assert len(rows) == 64  # two files, 4 and 8 pairs, LoRA and full, two precisions, four targets
    assert sum(row["met"] is None for row in rows) == 48
    assert rows[0]["beside"] == {"times faster": 2.0, "times fewer tokens": 2.0}
    judge.show(rows)
    told = capsys.readouterr().out
    assert "0.500 x, target <= 0.6x (of the whole process 0.667)" in told
    assert "48 of 64 targets not measured here" in told

    def missed(**changes):
        return [i for i, v in enumerate(verdicts(imaginary_cases(**changes))[0]) if v == "missed"]

    assert missed(shared={"backbone_s": 2.36}) == [0]  # 1.69x for 2x fewer tokens
    assert missed(trl={"step": {"median_s": 5.9}, "backbone_s": 4.0}) == [1]
    assert missed(fused_store={"step": {"median_s": 3.3}}) == [2]
    assert missed(shared_store={"extra_bytes": 2.5e9}) == [3]


def test_the_smaller_ratio_counts_where_that_of_24_layers_is_known():
    # As measured 5x; with 20 layers more (10 + 20) / (2 + 10) = 2.5x.
    rows = verdicts(imaginary_cases(shared_store={"backbone_s": 2.0}))[1]
    row = next(r for r in rows if r["cell"][1] == "step against TRL" and r["measured"])
    assert row["beside"] == {"as measured": 5.0, "with 24 layers": 2.5}
    assert (row["measured"], row["met"]) == (2.5, False)


def test_figures_that_are_missing_or_wrong_are_not_judged():
    assert verdicts(None)[0] == ["not measured"] * 4
    without = imaginary_cases(missing=("shared", "fused+store"))
    assert verdicts(without)[0] == ["not measured", "met", "not measured", "met"]
    wrong = imaginary_cases()
    for each in wrong["cases"]:
        for name in ("step", "faster", "memory_share", "step_of_24_layers_s"):
            each["runs"]["shared+store"].pop(name, None)
    assert verdicts(wrong)[0] == ["met"] + ["not measured"] * 3


def test_other_files_are_not_judged_and_other_cases_are():
    content = imaginary_cases(train=("lora",))
    first, second = content["cases"]
    first["file"] = "llmbar"
    second["case"]["pairs"] = 16
    rows = verdicts(content)[1]
    assert not [row for row in rows if "llmbar" in row["case"]]
    judged = [row["case"] for row in rows if row["met"]]
    assert judged[0] == "pandalm-human, 16 pairs, LoRA, fp32: backbone over token ratio"
    assert len(judged) == 4


# ---- tables -------------------------------------------------------------------------------------


@pytest.fixture
def project(monkeypatch, tmp_path):
    """A project of its own, for tables that name their files."""
    from benchmarks import readme, readme_cpu

    for module in (readme, readme_cpu):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    (tmp_path / "machine").mkdir()
    return tmp_path / "machine"


def test_step_table_shows_backbone_and_what_sharing_alone_brings(project):
    from benchmarks import readme

    path = project / "dpo_step.json"
    content = imaginary_cases()
    del content["cases"][0]["runs"]["shared"]  # other contestants than the later cases
    for name in ("step", "faster"):
        del content["cases"][1]["runs"]["shared+store"][name]
    path.write_text(json.dumps(content))
    lines = readme.step_table(path).splitlines()
    assert "with 4 of its 24 layers. A CPU, 2 threads, avx2; torch 2.13.0, TRL 1.16.0." in lines[0]
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert table[0][1:] == [
        *("TRL s/step", "fused+store", "shared+store", "shared"),
        *("shared: backbone", "shared+store against fused+store"),
    ]
    assert table[2] == [
        *("llamafactory-dpo-en, 4, lora, fp32", "10.0", "2.5x (1.6x), 1.00"),
        *("5.0x (4.3x), 0.50", "-", "-", "2.0x (2.7x)"),
    ]
    assert table[3][3:] == ["-", "3.3x, 0.50", "2.0x for 2.0x fewer tokens", "-"]
    assert {len(row) for row in table} == {7}
    assert lines[-1] == "From `machine/dpo_step.json`, commit `0123456`."
    content["cases"][-1]["commit"] = "fedcba9876"
    path.write_text(json.dumps(content))
    assert readme.step_table(path).endswith(
        "`machine/dpo_step.json`. At commit `0123456`: llamafactory-dpo-en, 4, lora, fp32; "
        "llamafactory-dpo-en, 4, full, fp32; pandalm-human, 4, lora, fp32. "
        "At commit `fedcba9`: pandalm-human, 4, full, fp32."
    )


def test_step_table_is_in_order_whatever_was_measured_first(project):
    from benchmarks import readme

    content = imaginary_cases()
    lora, full, eight, half = content["cases"]  # of the first file, of the second
    eight["case"]["pairs"] = 8
    half["case"]["dtype"] = "amp"
    content["cases"] = [full, eight, half, lora]
    (project / "dpo_step.json").write_text(json.dumps(content))
    lines = readme.step_table(project / "dpo_step.json").splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("|")][2:] == [
        "| llamafactory-dpo-en, 4, lora, fp32",
        "| llamafactory-dpo-en, 4, full, fp32",
        "| pandalm-human, 4, full, fp32 under bf16 autocast",
        "| pandalm-human, 8, lora, fp32",
    ]


def test_step_table_tells_depths_apart(project):
    from benchmarks import readme

    content = imaginary_cases(train=("full",))
    content["cases"][1]["case"]["layers"] = 24
    (project / "dpo_step.json").write_text(json.dumps(content))
    text = readme.step_table(project / "dpo_step.json")
    assert "with 4 or 24 of its 24 layers" in text
    assert "| pandalm-human, 4, full, fp32, 24 layers |" in text
    assert "pandalm-human, 4 pairs, all weights, fp32, 24 layers: " in str(verdicts(content)[1])


def test_targets_of_steps_are_a_table_of_their_own_and_name_their_commit(project):
    from benchmarks import readme, readme_cpu, targets

    (project / "dpo_step.json").write_text(json.dumps(imaginary_cases(missing=("shared",))))
    assert targets.main([str(project)]) == 0  # without any of the other benchmarks
    text = readme_cpu.targets_table(project / "targets.json")
    row = next(line for line in text.splitlines() if line.startswith("| pandalm-human, 4 pairs, L"))
    assert row == (
        "| pandalm-human, 4 pairs, LoRA, fp32 | - | 4.29 x (5) met | 2 x (2.71) met "
        "| 0.5 x (0.667) met |"
    )
    assert text.count("pandalm-human, 4 pairs, LoRA, fp32 |") == 1
    assert text.endswith("From `machine/targets.json`, commit `0123456`.")

    steps = imaginary_cases()
    steps["cases"][0]["commit"] = "fedcba9876"
    (project / "dpo_step.json").write_text(json.dumps(steps))
    (project / "head.json").write_text(json.dumps({"environment": ENVIRONMENT, "cases": []}))
    assert targets.main([str(project)]) == 0
    assert readme_cpu.targets_table(project / "targets.json").endswith(
        "`machine/targets.json`. At commit `0123456`: head; dpo_step. "
        "At commit `fedcba9`: dpo_step."
    )
    content = json.loads((project / "targets.json").read_text())
    content["environments"]["dpo_step"]["date"] = "2026-03-01T00:00:00+00:00"
    (project / "targets.json").write_text(json.dumps(content))
    # The newest of its parts dates a file.
    older = content | {"environments": {"head": ENVIRONMENT | {"date": "2026-02-01"}}}
    (project.parent / "another").mkdir()
    (project.parent / "another" / "targets.json").write_text(json.dumps(older))
    assert readme.results("targets")[0] == project / "targets.json"


def test_targets_table_says_in_one_line_that_no_step_was_measured(project):
    from benchmarks import readme_cpu, targets

    (project / "head.json").write_text(json.dumps({"environment": ENVIRONMENT, "cases": []}))
    assert targets.main([str(project)]) == 0
    text = readme_cpu.targets_table(project / "targets.json")
    assert "Whole training steps (`dpo_step`): not measured." in text
    assert "pandalm-human" not in text


def test_a_gpus_steps_are_no_cpus_and_stand_in_its_table(project):
    from benchmarks import readme

    gpu = {"name": "A card", "memory_bytes": 1}
    versions = ENVIRONMENT["versions"] | {"liger-kernel": None}
    env = ENVIRONMENT | {"gpu": gpu, "versions": versions}
    (project / "dpo_step.json").write_text(json.dumps(imaginary_cases() | {"environment": env}))
    assert readme.results("dpo_step") == []
    assert readme.results("dpo_step", on_gpu=True) == [project / "dpo_step.json"]
    size = {"completion": 8192}
    head = {"environment": env, "cases": [{"case": "llama/bf16", "size": size, "peers": {}}]}
    (project / "head.json").write_text(json.dumps(head))
    text = readme.gpu_table(project)
    assert "4 of its 24 layers. A card; torch 2.13.0" in text
    assert "| pandalm-human, 4, lora, fp32 | 10.0 |" in text
