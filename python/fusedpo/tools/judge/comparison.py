"""Two answers compared in both orders, and what follows from the two verdicts.

A judge has habits of position. Only what it says in both orders counts as its opinion; an opinion
that turns with the order is a flip, and no win for anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from .asking import ask_all
from .cache import ReplyCache, content_key
from .callables import JudgeFunction, call, function_identity
from .endpoint import Endpoint, Request
from .template import DEFAULT_TEMPLATE, check_template, fill
from .verdict import Verdict, parse_verdict

Judge = Endpoint | JudgeFunction
Outcome = Literal["win", "loss", "tie", "half", "flip", "identical", "unparsed"]


class Question(NamedTuple):
    """A prompt and two answers, as plain text."""

    prompt: str
    a: str
    b: str


class Comparison(NamedTuple):
    """The verdicts on two answers: with `a` shown first, and with `b` shown first.

    "A" is the answer shown first, "B" the one shown second; None is a reply that could not be read,
    or, where the answers are identical, that nobody was asked.
    """

    question: Question
    a_first: Verdict | None
    b_first: Verdict | None

    @property
    def outcome(self) -> Outcome:
        """For `a`: win and loss were said in both orders; half in one, with a tie in the other;
        flip: the answer in the same place won in both."""
        if self.question.a == self.question.b:
            return "identical"
        if self.a_first is None or self.b_first is None:
            return "unparsed"
        score = _FOR_FIRST[self.a_first] - _FOR_FIRST[self.b_first]
        if score == 0:
            return "tie" if self.a_first == "tie" else "flip"
        if abs(score) == 1:
            return "half"
        return "win" if score > 0 else "loss"


_FOR_FIRST: dict[Verdict, int] = {"A": 1, "B": -1, "tie": 0}


class Asked(NamedTuple):
    """Comparisons in the order of their questions, and how many replies they took."""

    comparisons: list[Comparison]
    asked: int  # replies that the judge gave now
    cached: int  # replies that were there before


def check_judge(judge: Judge, template: str) -> None:
    """Refuse a template that lacks a field, or that nobody is asked with.

    Raises:
        ValueError: the message says which.
    """
    check_template(template)
    if template != DEFAULT_TEMPLATE and not isinstance(judge, Endpoint):
        raise ValueError("a template is for a server, and the judge is a function; leave it out.")


def judge_identity(judge: Judge, template: str = DEFAULT_TEMPLATE) -> dict[str, Any]:
    """What decides a judge's replies, JSON-able.

    Raises:
        TypeError: it is a function that cannot be told from another.
    """
    if isinstance(judge, Endpoint):
        return {**judge.identity, "template": template}
    return function_identity(judge)


def compare(
    questions: Sequence[Question],
    judge: Judge,
    cache: ReplyCache,
    *,
    template: str = DEFAULT_TEMPLATE,
    keep: bool = True,
    progress: Callable[[int, int], None] = lambda done, todo: None,
) -> Asked:
    """Judge each question in both orders; what the cache has, or what comes twice, is asked once.

    Args:
        questions: what to judge; identical answers are not shown to the judge.
        judge: a server or a function.
        cache: where replies are looked up and put.
        template: the words for a server.
        keep: whether the cache outlives this call, so that a function must be one that can be told
            from another.
        progress: told the replies that are there, and those that are needed.

    Raises:
        EndpointError: the server failed for good; replies until then are in the cache.
        TypeError: a function returned no text, or (with `keep`) cannot be told from another.
    """
    ordered = [shown for each in questions if each.a != each.b for shown in _both_orders(each)]
    identity = judge_identity(judge, template) if keep else {}
    keys = {shown: content_key({**identity, "shown": shown}) for shown in ordered}
    missing = [shown for shown in keys if cache.get(keys[shown]) is None]
    progress(len(keys) - len(missing), len(keys))
    done = 0

    def put(number: int, reply: str) -> None:
        nonlocal done
        cache.put(keys[missing[number]], reply)
        done += 1
        progress(len(keys) - len(missing) + done, len(keys))

    if isinstance(judge, Endpoint):
        if missing:
            ask_all(judge, [_request(template, shown) for shown in missing], put)
    else:
        for number, shown in enumerate(missing):
            put(number, call(judge, *shown))

    def verdict(shown: tuple[str, str, str]) -> Verdict | None:
        reply = cache.get(keys[shown]) if shown in keys else None
        return None if reply is None else parse_verdict(reply)

    comparisons = [Comparison(each, *map(verdict, _both_orders(each))) for each in questions]
    return Asked(comparisons, len(missing), len(keys) - len(missing))


def _both_orders(question: Question) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    prompt, a, b = question
    return (prompt, a, b), (prompt, b, a)


def _request(template: str, shown: tuple[str, str, str]) -> Request:
    return Request([{"role": "user", "content": fill(template, *shown)}])
