"""The command `fusedpo convert`."""

from __future__ import annotations

import json
import pathlib
import typing
from typing import Any

import pytest
from convert_cases import (
    TEXTS,
    values,
    write,
)
from fusedpo.tools.formats import (
    FORMS,
    TARGETS,
)
from fusedpo.tools.formats.renderers import RENDERERS


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> typing.Callable[..., tuple[int, str, str]]:
    """Run `fusedpo convert`; returns (exit code, stdout, stderr)."""
    typer = pytest.importorskip("typer", reason="the command needs the extra cli")
    from fusedpo.cli.command import command as as_command
    from fusedpo.cli.convert import convert as function

    app = typer.Typer()
    app.command()(as_command("convert", function))

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            app([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return typing.cast(int, stop.value.code), shown.out, shown.err

    return run


def test_the_command_tells_by_its_exit_code_whether_all_rows_went_through(
    command: Any, tmp_path: pathlib.Path
) -> None:
    source = write(tmp_path / "a.jsonl", [TEXTS])
    code, out, err = command(source, tmp_path / "b.jsonl", "--to", "hh")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"{source}: 1 row of preference"
    write(source, [TEXTS, {}])
    code, out, _ = command(source, tmp_path / "b.jsonl", "--to", "hh", "--json")
    assert code == 1
    assert json.loads(out)["problems"][0]["line"] == 2
    assert len(values(tmp_path / "b.jsonl")) == 1


def test_the_command_takes_the_form_and_the_template(command: Any, tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.jsonl", [{**TEXTS, "completion": "5", "label": 0}])
    options = ("--from", "kto", "--to", "unpaired", "--template", "chatml")
    code, _, err = command(source, tmp_path / "b.jsonl", *options)
    assert (code, err) == (0, "")
    assert values(tmp_path / "b.jsonl")[0].completion == "5<|im_end|>"


def test_the_command_fails_with_the_reason(command: Any, tmp_path: pathlib.Path) -> None:
    code, out, err = command(tmp_path / "no.jsonl", tmp_path / "b.jsonl", "--to", "hh")
    assert (code, out) == (1, "")
    assert "fusedpo convert: " in err
    assert "no.jsonl" in err
    assert command(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--to", "dpo")[0] == 2


def test_the_command_offers_all_that_there_is() -> None:
    pytest.importorskip("typer", reason="the command needs the extra cli")
    from fusedpo.cli import convert as offered

    assert typing.get_args(offered.Form) == tuple(FORMS)
    assert typing.get_args(offered.Target) == TARGETS
    assert typing.get_args(offered.Template) == RENDERERS
