"""The cache of replies: nothing is asked twice, also after a kill, and nothing is mixed up."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import judges
import pytest
from fusedpo.tools.judge import Answer, ReplyCache, judge
from misbehaving_server import Payload, serve


def answers(count: int, text: str) -> list[Answer]:
    return [Answer(f"Question {i}?", f"{text} {i}") for i in range(count)]


def test_a_second_run_asks_nothing_and_reports_the_same(tmp_path: pathlib.Path) -> None:
    a, b = answers(3, "a"), answers(3, "longer")
    cache = tmp_path / "folder" / "cache.jsonl"
    first = judge(a, b, judge=judges.longer, cache=cache)
    content = cache.read_bytes()
    second = judge(a, b, judge=judges.longer, cache=cache)
    assert (first.asked, first.cached, second.asked, second.cached) == (6, 0, 0, 6)
    assert first.details == second.details
    assert first.interval == second.interval
    assert cache.read_bytes() == content


def test_the_same_question_twice_is_asked_once(tmp_path: pathlib.Path) -> None:
    a, b = [Answer("p", "a"), Answer("p", "a")], [Answer("p", "bb"), Answer("p", "bb")]
    report = judge(a, b, judge=judges.longer, cache=tmp_path / "cache.jsonl")
    assert (report.asked, report.losses) == (2, 2)


def test_another_function_is_asked_anew(tmp_path: pathlib.Path) -> None:
    a, b, cache = answers(1, "a"), answers(1, "bb"), tmp_path / "cache.jsonl"
    assert judge(a, b, judge=judges.longer, cache=cache).losses == 1
    assert judge(a, b, judge=judges.first, cache=cache).flips == 1


def test_a_function_that_was_edited_is_asked_anew(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    cache, reports = tmp_path / "cache.jsonl", []
    for version, verdict in enumerate(("A", "tie")):
        source = tmp_path / f"version{version}.py"
        source.write_text(f'def same(prompt, first, second):\n    return "{verdict}"\n')
        module = types.ModuleType("edited")
        exec(compile(source.read_text(), source, "exec"), vars(module))
        reports.append(judge(answers(1, "a"), answers(1, "b"), judge=module.same, cache=cache))
    assert [report.asked for report in reports] == [2, 2]
    assert [report.flips for report in reports] == [1, 0]


def test_a_function_that_cannot_be_told_from_another_needs_no_cache_but_gets_none(
    tmp_path: pathlib.Path,
) -> None:
    margin = 1

    def closure(prompt: str, first: str, second: str) -> str:
        return "A" if len(first) > len(second) + margin else "B"

    a, b = answers(1, "a"), answers(1, "b")
    assert judge(a, b, judge=closure).flips == 1
    with pytest.raises(TypeError, match="closure"):
        judge(a, b, judge=closure, cache=tmp_path / "cache.jsonl")

    def default(prompt: str, first: str, second: str, margin: int = margin) -> str:
        return "A"

    def keyword(prompt: str, first: str, second: str, *, margin: int = margin) -> str:
        return "A"

    for each in (default, keyword, lambda prompt, first, second: "A"):
        with pytest.raises(TypeError, match="default arguments"):
            judge(a, b, judge=each, cache=tmp_path / "cache.jsonl")
    invisible: dict[str, object] = {}
    exec("def hidden(prompt, first, second): return 'A'", invisible)
    with pytest.raises(TypeError, match="hidden has none"):
        judge(a, b, judge=invisible["hidden"], cache=tmp_path / "cache.jsonl")  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_a_kill_tore_is_asked_again(tmp_path: pathlib.Path, cut: int) -> None:
    a, b, cache = answers(3, "a"), answers(3, "bb"), tmp_path / "cache.jsonl"
    judge(a, b, judge=judges.longer, cache=cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-cut])
    report = judge(a, b, judge=judges.longer, cache=cache)
    assert (report.asked, report.cached) == (1, 5)
    assert cache.read_bytes() == whole


def test_a_line_that_is_no_reply_is_an_error_and_stays(tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache.jsonl"
    judge(answers(2, "a"), answers(2, "b"), judge=judges.longer, cache=cache)
    lines = cache.read_bytes().split(b"\n")
    for damage in (b'{"key": "x"}', lines[1][:-3], b"[]"):
        content = b"\n".join([lines[0], damage, *lines[2:]])
        cache.write_bytes(content)
        with pytest.raises(ValueError, match=r"cache\.jsonl:2 must be a line of a cache"):
            judge(answers(2, "a"), answers(2, "b"), judge=judges.longer, cache=cache)
        assert cache.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "p", "completion": "c"}',
        '{"prompt": "p", "completion": "c"}\n{"prompt": "q"',
        '{"key": "x"}',
        "notes",
        '{"key": "k", "reply": "A"}\nnotes',
    ],
)
def test_a_file_that_is_no_cache_stays_as_it_is(tmp_path: pathlib.Path, content: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.jsonl:\d must be a line of a cache"):
        ReplyCache(path)
    assert path.read_text() == content


@pytest.mark.parametrize("whole", ['{"key": "ab", "reply": "c\\"d"}'])
def test_every_beginning_of_a_line_is_cut_off(tmp_path: pathlib.Path, whole: str) -> None:
    path = tmp_path / "cache.jsonl"
    for length in range(1, len(whole) + 1):
        path.write_text(whole + "\n" + whole[:length])
        with ReplyCache(path) as cache:
            assert len(cache) == 1
        assert path.read_text() == whole + "\n"


def test_two_processes_do_not_write_one_cache(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "cache.jsonl"
    with ReplyCache(path), pytest.raises(OSError, match="in use by another process"):
        ReplyCache(path)
    with ReplyCache(path) as cache:
        assert len(cache) == 0


def test_any_text_is_kept_as_it_is(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "cache.jsonl"
    reply = 'line\nline\u2028\x00 "quoted" \ud800 \U0001f600'
    with ReplyCache(path) as cache:
        cache.put("k", reply)
    with ReplyCache(path) as cache:
        assert cache.get("k") == reply


SCRIPT = """
import json, sys
from fusedpo.tools.judge import Endpoint, judge
url, cache = sys.argv[1:]
report = judge("a.jsonl", "b.jsonl", judge=Endpoint(url, "m", concurrency=1), cache=cache)
print(json.dumps(report.as_dict()))
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("httpx")
    for name in "ab":
        rows = [each._asdict() for each in answers(5, name)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)

    def start(url: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, url, "cache.jsonl"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"NO_PROXY": "127.0.0.1"},
        )

    children: list[subprocess.Popen[str]] = []

    def kill_at_the_fifth(payload: Payload) -> str:
        if len(server.payloads) == 5:
            children[0].kill()
            children[0].wait()
        return "[[A]]"

    with serve(kill_at_the_fifth) as server:
        children.append(start(server.url))
        assert children[0].wait(60) == -signal.SIGKILL
        before = len(server.payloads)
        server.answer = lambda payload: "[[A]]"
        again = start(server.url)
        report = json.loads(again.communicate(timeout=60)[0])
        asked = [payload["messages"][0]["content"] for payload in server.payloads]
    assert before == 5
    assert (report["cached"], report["asked"]) == (4, 6)
    assert (report["flip_rate"], report["wins"]) == (1.0, 0)
    # The one whose reply the killed process never saw is the only one that is asked again.
    assert len(asked) == 11
    assert len(set(asked)) == 10
