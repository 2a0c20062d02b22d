"""`fusedpo judge` from the command line."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import judges  # noqa: F401  named on the command line
import pytest

pytest.importorskip("typer", reason="the command needs the extras")
pytest.importorskip("httpx", reason="asking a server needs httpx")

from fusedpo import cli
from misbehaving_server import Payload, serve, status

URL = "http://localhost:1/v1"


@pytest.fixture
def files(tmp_path: pathlib.Path) -> tuple[str, str]:
    paths = []
    for name, text in (("a", "long answer"), ("b", "short")):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"Question {i}?", "completion": f"{text} {i}"} for i in range(3)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(path))
    return paths[0], paths[1]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    code = cli.main(["judge", *map(str, arguments), "--json"])
    shown = capsys.readouterr()
    return code, json.loads(shown.out), shown.err


def test_a_function_judges(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, report, _ = run(capsys, *files, "--judge", "judges:longer")
    assert code == 0
    assert (report["wins"], report["flips"], report["asked"]) == (3, 0, 6)
    assert cli.main(["judge", *files, "--judge", "judges:longer"]) == 0
    assert "win 3, tie 0, loss 0" in capsys.readouterr().out


def test_a_server_judges(
    files: tuple[str, str],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("KEY_OF_THE_TEST", "sk-secret")
    template = tmp_path / "template.txt"
    template.write_text("Q: {prompt} 1: {first} 2: {second}")
    options = ["--judge-model", "m", "--judge-key", "KEY_OF_THE_TEST", "--template", template]
    options += ["--judge-body", '{"temperature": 0.5}', "--cache", tmp_path / "cache"]
    with serve() as server:
        code, report, error = run(capsys, *files, "--judge", server.url, *options)
        assert (code, report["flip_rate"]) == (0, 1.0)
        assert "secret" not in json.dumps(report) + error
        assert server.headers[0]["Authorization"] == "Bearer sk-secret"
        assert server.payloads[0]["temperature"] == 0.5
        asked = {payload["messages"][0]["content"] for payload in server.payloads}
        assert "Q: Question 0? 1: long answer 0 2: short 0" in asked
        assert run(capsys, *files, "--judge", server.url, *options)[1]["cached"] == 6
        server.faults = [status(401)] * 8
        code, report, error = run(capsys, *files, "--judge", server.url, "--judge-model", "m")
        assert code == 1
        assert "fusedpo judge: " in error
        assert "Check the API key" in report["error"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--judge", URL], "--judge-model"),
        (["--judge", "judges:longer", "--judge-model", "m"], "address of a server"),
        (["--judge", URL, "--judge-model", "m", "--judge-key", "NOT_SET"], "NOT_SET"),
        (["--judge", URL, "--judge-model", "m", "--judge-body", "[]"], "JSON object"),
        (["--judge", "judges:longer", "--timeout", "3"], "--timeout must come with the address"),
        (["--judge", "judges:longer", "--resamples", "0"], "resamples"),
    ],
)
def test_wrong_options_are_told(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    code, report, _ = run(capsys, *files, *options)
    assert code == 1
    assert told in report["error"]


def test_ctrl_c_ends_at_once_what_is_in_flight(
    files: tuple[str, str], tmp_path: pathlib.Path
) -> None:
    def answer(payload: Payload) -> str:
        if len(server.payloads) > 3:
            child.send_signal(signal.SIGINT)
            time.sleep(20)
        return "[[A]]"

    with serve(answer) as server:
        command = [sys.executable, "-m", "fusedpo", "judge", *files, "--judge", server.url]
        command += ["--judge-model", "m", "--cache", str(tmp_path / "cache"), "--concurrency", "1"]
        child = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"NO_PROXY": "127.0.0.1"}
        )
        while len(server.payloads) <= 3 and child.poll() is None:
            time.sleep(0.05)
        start = time.monotonic()
        error = child.communicate(timeout=60)[1]
        assert time.monotonic() - start < 15
    assert child.returncode == 130
    assert "stopped by SIGINT. What was done is kept" in error
    assert len((tmp_path / "cache").read_text().splitlines()) == 3
