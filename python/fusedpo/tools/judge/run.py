"""`judge`: two sets of answers to the same prompts, compared."""

from __future__ import annotations

import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from fusedpo.tools.files import write_whole

from .answers import Answered, matched, sequence_of
from .cache import ReplyCache
from .comparison import Comparison, Judge, Question, check_judge, compare
from .endpoint import Endpoint
from .report import JudgeReport
from .statistics import bootstrap, flip_rate, lengths, win_rate
from .template import DEFAULT_TEMPLATE

Answers = str | os.PathLike[str] | Sequence[Answered]


def judge(
    a: Answers,
    b: Answers,
    *,
    judge: Judge,
    cache: str | os.PathLike[str] | None = None,
    template: str = DEFAULT_TEMPLATE,
    output: str | os.PathLike[str] | None = None,
    seed: int = 0,
    resamples: int = 10_000,
    progress: Callable[[int, int], None] = lambda done, todo: None,
) -> JudgeReport:
    """Compare two sets of answers to the same prompts, pair by pair, always in both orders.

    Args:
        a, b: a JSONL file as `fusedpo generate` writes it, or objects with `prompt` and
            `completion`. The i-th answer to a prompt is compared with the other's i-th.
        judge: an `Endpoint`, or a function (prompt, first, second) that returns "A", "B" or "tie",
            in any form that `parse_verdict` reads.
        cache: a file of replies, made if it is not there. What it has is not asked again, so a run
            that was stopped goes on where it was.
        template: what an endpoint is asked, with {prompt}, {first} and {second}.
        output: a JSONL file for every comparison, with both verdicts and what follows; none of the
            other files. Its folder is made if it is not there.
        seed, resamples: of the bootstrap interval.
        progress: told how many replies are there, of how many.

    Returns:
        JudgeReport: from the side of `a`.

    Raises:
        EndpointError: the server failed for good.
        ValueError, TypeError, OSError: an argument or a file; the message says which.

    Example:
        >>> from fusedpo.tools.judge import Answer, judge
        >>> def shorter(prompt: str, first: str, second: str) -> str:
        ...     return "A" if len(first) < len(second) else "B"
        >>> report = judge([Answer("Hi", "Hello.")], [Answer("Hi", "Well...")], judge=shorter)
        >>> report.wins, report.flip_rate
        (1, 0.0)
    """
    check_judge(judge, template)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1; got {resamples}.")
    _check_output(output, a=a, b=b, cache=cache)
    matches = matched(sequence_of(a), sequence_of(b))
    questions = [Question(each.prompt, each.a, each.b) for each in matches]
    with ReplyCache(cache) as replies:
        asked = compare(
            questions, judge, replies, template=template, keep=cache is not None, progress=progress
        )
    found = asked.comparisons
    if output is not None:
        write_comparisons(output, found)
    counts = Counter(each.outcome for each in found)
    ties = counts["tie"] + counts["half"] + counts["flip"] + counts["identical"]
    return JudgeReport(
        a=_name(a, "a"),
        b=_name(b, "b"),
        judge=judge_name(judge),
        comparisons=len(found),
        wins=counts["win"],
        losses=counts["loss"],
        ties=ties,
        unparsed=counts["unparsed"],
        flips=counts["flip"],
        halves=counts["half"],
        identical=counts["identical"],
        win_rate=win_rate(found),
        interval=bootstrap(found, resamples=resamples, seed=seed),
        flip_rate=flip_rate(found),
        lengths=lengths(found),
        asked=asked.asked,
        cached=asked.cached,
        details=tuple(found),
    )


def judge_name(judge: Judge) -> str:
    if isinstance(judge, Endpoint):
        return f"{judge.model} at {judge.base_url}"
    return getattr(judge, "__qualname__", type(judge).__name__)


def write_comparisons(path: str | os.PathLike[str], comparisons: Sequence[Comparison]) -> None:
    """Write a line for each comparison: prompt, a, b, both verdicts and the outcome for `a`."""
    rows = [
        {
            **each.question._asdict(),
            "a_first": each.a_first,
            "b_first": each.b_first,
            "outcome": each.outcome,
        }
        for each in comparisons
    ]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _check_output(output: str | os.PathLike[str] | None, **others: Any) -> None:
    """Refuse, and make ready, what would fail or overwrite something after all was asked."""
    if output is None:
        return
    path = pathlib.Path(output)
    for name, other in others.items():
        if (
            isinstance(other, (str, os.PathLike))
            and path.resolve() == pathlib.Path(other).resolve()
        ):
            raise ValueError(f"output must be another file than {name}; both are {path}.")
    if path.is_dir():
        raise ValueError(f"output must be a file; {path} is a folder.")
    path.parent.mkdir(parents=True, exist_ok=True)


def _name(answers: Answers, default: str) -> str:
    return os.fspath(answers) if isinstance(answers, (str, os.PathLike)) else default
