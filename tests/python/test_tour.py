"""The tour of the whole loop: script, notebook and page have the same commands, and they run."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def commands(text: str, before: str = "") -> list[str]:
    return re.findall(rf"^{re.escape(before)}(fusedpo .+)$", text, re.MULTILINE)


def read_notebook(path: pathlib.Path) -> Any:
    nbformat = pytest.importorskip("nbformat", reason="the notebook is read with nbformat")
    return nbformat.read(path, as_version=4)


def test_script_notebook_and_page_have_the_same_commands() -> None:
    script = commands((EXAMPLES / "tour.sh").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    cells = read_notebook(EXAMPLES / "tour.ipynb").cells
    sources = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert commands(page, before="$ ") == script
    assert commands(sources) == script
    steps = "convert lint precompute train plot diagnose generate judge pairs iterate pathologies"
    assert {line.split()[1] for line in script} == set(steps.split())


def test_notebook_runs_on_a_model_and_data_made_on_the_spot(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="the notebook is run with nbclient")
    pytest.importorskip("ipykernel", reason="the notebook is run with ipykernel")
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("*_output"))
    monkeypatch.delenv("FUSEDPO_REAL_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    scripts = pathlib.Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.environ['PATH']}")
    notebook = read_notebook(EXAMPLES / "tour.ipynb")
    where = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()

    output = tmp_path / "examples" / "tour_output"
    report = json.loads((output / "trained" / "report.json").read_text(encoding="utf-8"))
    assert report["metrics"]["eval_rewards/accuracies"] > 0.5
    clean = (output / "clean.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(clean) == 200  # of 203: two were there twice, one preferred nothing
    (rate,) = win_rates(notebook, "iterated.jsonl against before.jsonl")
    assert rate > 50
    assert (output / "curves.png").stat().st_size > 10_000


def win_rates(notebook: Any, comparison: str) -> list[float]:
    """The win rates, in percent, that the cells printed for a comparison."""
    texts = [
        "".join(each.text for each in cell.get("outputs", []) if each.get("name") == "stdout")
        for cell in notebook.cells
    ]
    wanted = [text for text in texts if text.startswith(comparison)]
    return [float(match[1]) for text in wanted if (match := re.search(r"win rate ([\d.]+)", text))]
