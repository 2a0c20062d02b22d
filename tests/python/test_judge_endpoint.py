"""A judge behind HTTP: each way in which a real server fails, and what is asked of it when."""

from __future__ import annotations

import email.utils
import pathlib
import time
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("httpx", reason="asking a server needs httpx")

from fusedpo.tools.judge import (
    Answer,
    Endpoint,
    EndpointError,
    JudgeReport,
    Request,
    ask_all,
    judge,
)
from misbehaving_server import (
    Behaviour,
    Payload,
    Server,
    body,
    completion,
    dribble,
    reset,
    serve,
    silence,
    status,
    torn,
)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def endpoint(server: Server, **options: Any) -> Endpoint:
    options = {"backoff": 0.01, "concurrency": 1, "timeout": 10.0} | options
    return Endpoint(server.url, "referee", **options)


def ask(server: Server, count: int = 1, **options: Any) -> list[str]:
    replies = [""] * count
    requests = [Request([{"role": "user", "content": str(i)}]) for i in range(count)]
    ask_all(endpoint(server, **options), requests, replies.__setitem__)
    return replies


def echo(payload: Payload) -> str:
    return f"reply to {payload['messages'][0]['content']}"


def answers(count: int, text: str) -> list[Answer]:
    return [Answer(f"Question {i}?", f"{text} {i}") for i in range(count)]


FAULTS: dict[str, tuple[Behaviour, str]] = {
    "slow": (silence(2.5), "no answer within 1 seconds"),
    "a byte now and then": (dribble(5.0), "no answer within 1 seconds"),
    "408": (status(408), "status 408"),
    "425": (status(425), "status 425"),
    "429": (status(429), "status 429"),
    "500": (status(500), "status 500"),
    "503": (status(503), "status 503"),
    "connection reset": (reset, "Error"),
    "fewer bytes than promised": (torn, "Error"),
    "garbage": (body(b"\xff\x00\x9c garbage"), "no chat completion"),
    "HTML": (body(b"<html>Bad gateway</html>"), "no chat completion"),
    "half a JSON": (body(completion("[[A]]")[:40]), "no chat completion"),
    "nothing": (body(b""), "no chat completion"),
    "a list": (body(b"[]"), 'no list "choices"'),
    "no choices": (body(b'{"choices": []}'), 'no list "choices"'),
    "no message": (body(b'{"choices": [{"text": "[[A]]"}]}'), 'no "message" with a "content"'),
    "content that is no text": (
        body(b'{"choices": [{"message": {"content": [1]}}]}'),
        '"content" must be a text',
    ),
}


def patience(name: str) -> float:
    """Seconds to wait for an answer: few only where none comes, as the machine may be busy."""
    return 1.0 if FAULTS[name][1].startswith("no answer") else 10.0


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_that_passes_is_asked_again(name: str) -> None:
    with serve(echo, [FAULTS[name][0]] * 2) as server:
        assert ask(server, timeout=patience(name)) == ["reply to 0"]
        assert len(server.payloads) == 3
        assert server.payloads[0] == server.payloads[1] == server.payloads[2]


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_that_stays_is_an_error_that_says_what_it_was(name: str) -> None:
    fault, told = FAULTS[name]
    with serve(faults=[fault] * 2) as server:
        with pytest.raises(EndpointError, match=f"failed 2 times in a row.*{told}"):
            ask(server, timeout=patience(name), retries=1)
        assert len(server.payloads) == 2


@pytest.mark.parametrize(
    ("number", "todo"),
    [(400, ""), (401, "API key"), (403, "API key"), (404, "base URL"), (302, "")],
)
def test_a_refusal_is_not_asked_again(number: int, todo: str) -> None:
    with serve(faults=[status(number)]) as server:
        with pytest.raises(EndpointError, match=rf"status {number}.*as told.*{todo}"):
            ask(server)
        assert len(server.payloads) == 1


def test_no_server_is_an_error_that_names_the_address() -> None:
    with serve() as server:
        nobody = endpoint(server, retries=1)
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1.*ConnectError"):
        ask_all(nobody, [Request([])], lambda number, reply: None)


def test_retry_after_in_seconds_holds_every_question() -> None:
    def slowly(payload: Payload) -> str:
        time.sleep(0.2)
        return echo(payload)

    with serve(slowly, [status(429, {"Retry-After": "1"})]) as server:
        ask(server, count=4, concurrency=2, backoff=0.0)
        after = [when - server.times[0] for when in server.times]
    # One was in flight beside the one that was refused; all that begin later are held.
    assert len(after) == 5
    assert after[1] < 0.9
    assert after[2] >= 0.99


def test_retry_after_as_a_date_is_obeyed() -> None:
    when = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds
    with serve(echo, [status(503, {"Retry-After": when})]) as server:
        ask(server, backoff=0.0)
        assert server.times[1] - server.times[0] >= 0.9


@pytest.mark.parametrize("after", ["0", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_retry_after_that_is_past_does_not_end_the_backoff(after: str) -> None:
    with serve(echo, [status(429, {"Retry-After": after})] * 3) as server:
        ask(server, backoff=0.1)
        waits = [after - before for before, after in pairwise(server.times)]
    assert waits[0] >= 0.05
    assert waits[1] >= 0.10
    assert waits[2] >= 0.20


def test_a_retry_after_that_is_too_long_is_an_error() -> None:
    with (
        serve(faults=[status(429, {"Retry-After": "86400"})]) as server,
        pytest.raises(EndpointError, match="wait for 86400 seconds"),
    ):
        ask(server)


def test_waits_double() -> None:
    with serve(echo, [status(500)] * 3) as server:
        ask(server, backoff=0.1)
        waits = [after - before for before, after in pairwise(server.times)]
    assert waits[0] >= 0.05
    assert waits[1] >= 0.10
    assert waits[2] >= 0.20


def test_questions_are_paced() -> None:
    with serve(echo) as server:
        ask(server, count=5, concurrency=5, requests_per_minute=600)
        assert server.times[-1] - server.times[0] >= 4 * 0.1 - 0.02


def test_so_many_questions_are_in_flight_and_no_more() -> None:
    def slowly(payload: Payload) -> str:
        time.sleep(0.1)
        return echo(payload)

    with serve(slowly) as server:
        assert ask(server, count=9, concurrency=3) == [f"reply to {i}" for i in range(9)]
        assert server.most_in_flight == 3


def test_the_key_is_sent_and_told_nowhere(tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache.jsonl"
    with serve() as server:
        asked = endpoint(server, api_key="sk-secret", body={"max_completion_tokens": 9})
        report = judge(answers(1, "a"), answers(1, "b"), judge=asked, cache=cache)
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert server.payloads[0]["model"] == "referee"
    assert server.payloads[0]["max_completion_tokens"] == 9
    for text in (repr(asked), str(report.as_dict()), report.render(), cache.read_text()):
        assert "secret" not in text


def judged(server: Server, cache: pathlib.Path | None = None, count: int = 4) -> JudgeReport:
    return judge(answers(count, "yes"), answers(count, "no"), judge=endpoint(server), cache=cache)


def test_both_answers_stand_in_both_places() -> None:
    with serve() as server:
        judged(server, count=1)
    first, second = (payload["messages"][0]["content"] for payload in server.payloads)
    assert first.index("Question 0?") < first.index("yes 0") < first.index("no 0")
    assert second.index("Question 0?") < second.index("no 0") < second.index("yes 0")


def test_replies_that_are_no_verdict_are_counted_and_not_asked_again() -> None:
    with serve(lambda payload: "I would rather not say.") as server:
        report = judged(server)
        assert len(server.payloads) == 8
    assert (report.unparsed, report.wins, report.ties, report.losses) == (4, 0, 0, 0)
    assert report.win_rate is report.flip_rate is report.interval is None


def test_an_empty_reply_is_no_verdict() -> None:
    with serve(faults=[body(completion(None))]) as server:
        assert judged(server, count=1).unparsed == 1


def test_what_was_answered_before_a_failure_is_not_asked_again(tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache.jsonl"
    calls = 0

    def three_times(payload: Payload) -> str:
        nonlocal calls
        calls += 1
        if calls > 3:
            server.faults.append(status(401))
        return "[[A]]"

    with serve(three_times) as server:
        with pytest.raises(EndpointError, match="401"):
            judged(server, cache)
        asked = len(server.payloads)
        server.answer, server.faults = lambda payload: "[[A]]", []
        report = judged(server, cache)
    # Four replies came, the fifth request was refused.
    assert asked == 5
    assert (report.asked, report.cached) == (4, 4)
    assert len(server.payloads) == 5 + 4


def test_another_model_template_or_body_is_asked_anew(tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache.jsonl"
    one = answers(1, "yes"), answers(1, "no")
    with serve() as server:
        plain = endpoint(server)
        assert judge(*one, judge=plain, cache=cache).asked == 2
        assert judge(*one, judge=endpoint(server, timeout=5.0), cache=cache).asked == 0
        warmer = endpoint(server, body={"temperature": 1})
        assert judge(*one, judge=warmer, cache=cache).asked == 2
        other = Endpoint(server.url, "another referee")
        assert judge(*one, judge=other, cache=cache).asked == 2
        words = "{prompt} {first} {second}"
        assert judge(*one, judge=plain, cache=cache, template=words).asked == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"backoff": -1}, "backoff"),
        ({"concurrency": 0}, "concurrency"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"body": {"n": 2}}, "'n'"),
        ({"base_url": "localhost:8000/v1"}, "http://"),
        ({"model": ""}, "name of its model"),
        ({"base_url": "http://me:secret@localhost/v1"}, "no user and password"),
        ({"base_url": "me:secret@localhost/v1"}, "no user and password"),
        ({"base_url": "http:///v1"}, "name of a host"),
        ({"base_url": "http://localhost:99999/v1"}, "base_url.*ort"),
        ({"base_url": "http://localhost:secret/v1"}, "base_url.*ort"),
        ({"api_key": "sk-secret\nx"}, "printable ASCII"),
        ({"api_key": "sk secret"}, "printable ASCII"),
        ({"api_key": "sk-\u201csecret\u201d"}, "printable ASCII"),
        ({"api_key": ""}, "printable ASCII"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        Endpoint(**{"base_url": "http://localhost/v1", "model": "m", **options})
    if "secret@" in str(options) or "api_key" in options:
        assert "secret" not in str(error.value)


def test_any_text_is_sent() -> None:
    with serve() as server:
        ask_all(endpoint(server), [Request([{"role": "user", "content": "\ud800 \u00e9"}])], print)
        assert server.payloads[0]["messages"][0]["content"] == "\ud800 \u00e9"
        assert server.headers[0]["Content-Type"] == "application/json"


def test_a_request_that_cannot_be_sent_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    tried = []

    async def post(*args: Any, **more: Any) -> None:
        tried.append(args)
        raise httpx.LocalProtocolError("Illegal header value b'Bearer sk-secret'")

    monkeypatch.setattr(httpx.AsyncClient, "post", post)
    with pytest.raises(EndpointError, match="cannot be sent") as error:
        ask_all(Endpoint("http://localhost/v1", "m"), [Request([])], lambda number, reply: None)
    assert len(tried) == 1
    assert "secret" not in str(error.value)
