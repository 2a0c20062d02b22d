"""`fusedpo train` and `fusedpo sweep` from the command line: what goes where, and exit codes."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

pytest.importorskip("trl", reason="fusedpo.tools.train needs TRL")

import typer
from fusedpo.cli.command import command
from fusedpo.cli.sweep import sweep
from fusedpo.cli.train import train
from tools_train_helpers import no_plots, tiny_config  # noqa: F401
from trl_helpers import one_thread  # noqa: F401
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")


def run(*arguments: str) -> Any:
    app = typer.Typer()
    for name, function in (("train", train), ("sweep", sweep)):
        app.command(name)(command(name, function))
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def config(tiny: dict[str, Any], tmp_path: pathlib.Path) -> str:
    path = tmp_path / "dpo.json"
    options = {**tiny, "strategy": "dpo", "eval_split": 4, "kl_prompts": 0, "max_steps": 1}
    path.write_text(json.dumps({**options, "output_dir": str(tmp_path / "out")}), encoding="utf-8")
    return str(path)


def test_with_json_the_report_is_alone_on_stdout(config: str, tmp_path: pathlib.Path) -> None:
    result = run("train", config, "--json")
    assert result.exit_code == 0, result.output
    (stage,) = json.loads(result.stdout)["stages"]
    assert stage["output_dir"] == str(tmp_path / "out")
    assert stage == json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert "'loss'" in result.stderr  # what transformers prints


def test_a_dry_run_shows_arguments_and_memory(config: str, tmp_path: pathlib.Path) -> None:
    result = run("train", config, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "precompute_ref_log_probs" in result.stdout
    assert "memory: total" in result.stdout
    assert not (tmp_path / "out").exists()


def test_a_sweep_ends_with_its_table(config: str, tmp_path: pathlib.Path) -> None:
    result = run("sweep", config, "--beta", "0.1", "--output-dir", str(tmp_path / "sweep"))
    assert result.exit_code == 0, result.output
    assert "1 runs trained, 0 were finished before" in result.stdout
    assert (tmp_path / "sweep" / "runs" / "dpo-beta0.1" / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no.yaml"], "fusedpo train: no.yaml: there is no such file."),
        (["sweep", "no.yaml", "--beta", "0.1,x"], "--beta must be numbers with commas between"),
        (["sweep", "no.yaml"], "fusedpo sweep: no.yaml: there is no such file."),
    ],
)
def test_a_wrong_command_fails_with_a_message_on_stderr(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
