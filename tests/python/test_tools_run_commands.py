"""`fusedpo plot` and `fusedpo diagnose`: output, exit codes, and what they do without."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("typer", reason="the command line is typer's")

import typer
from diagnosis_cases import CASES
from fusedpo.cli import diagnose, plot
from fusedpo.cli.command import command
from run_logs import simulate, write_run
from typer.testing import CliRunner, Result

APP = typer.Typer()
APP.command("plot")(command("plot", plot.plot))
APP.command("diagnose")(command("diagnose", diagnose.diagnose))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(APP, [str(each) for each in arguments])


def test_the_exit_code_follows_the_worst_finding(tmp_path: pathlib.Path) -> None:
    good = write_run(tmp_path / "good", simulate())
    warned = write_run(tmp_path / "warned", CASES["chosen_logps_fall"].faulty.entries)
    broken = write_run(tmp_path / "broken", CASES["not_finite"].faulty.entries)
    result = run("diagnose", good, "--fail-on", "warning")
    assert result.exit_code == 0
    assert "good, 100 steps: nothing found" in result.stdout
    result = run("diagnose", warned)
    assert result.exit_code == 0
    assert "likelihood displacement" in result.stdout
    assert run("diagnose", warned, "--fail-on", "warning").exit_code == 1
    assert run("diagnose", broken).exit_code == 1
    assert run("diagnose", broken, "--fail-on", "warning").exit_code == 1
    assert run("diagnose", broken, "--fail-on", "never").exit_code == 0


def test_json_is_all_that_stdout_has(tmp_path: pathlib.Path) -> None:
    bad = write_run(tmp_path / "bad", simulate(beta=0.01))
    result = run("diagnose", bad, "--beta", "0.01", "--json")
    report = json.loads(result.stdout)
    assert [each["rule"] for each in report["findings"]] == ["beta_too_low"]
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")
    picture = tmp_path / "runs.svg"
    result = run("plot", bad, "--output", picture, "--json")
    assert json.loads(result.stdout)["path"] == str(picture)
    assert picture.exists()


def test_errors_go_to_stderr_with_exit_code_1(tmp_path: pathlib.Path) -> None:
    result = run("diagnose", tmp_path / "none")
    assert result.exit_code == 1
    assert result.stderr.startswith("fusedpo diagnose: a run must be a folder")
    assert run("plot").exit_code == 2


def test_a_diagnosis_needs_neither_trl_nor_matplotlib(tmp_path: pathlib.Path) -> None:
    # In a process of its own: modules that are imported anew here would stay, beside the old ones.
    script = (
        "import sys\n"
        "for name in ('trl', 'transformers', 'datasets', 'peft', 'matplotlib', 'rich'):\n"
        "    sys.modules[name] = None\n"
        "from fusedpo.tools.diagnose import diagnose\n"
        "assert not diagnose(sys.argv[1]).findings\n"
    )
    folder = write_run(tmp_path / "run", simulate())
    words = [sys.executable, "-c", script, str(folder)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
