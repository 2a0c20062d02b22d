"""`fusedpo judge`."""

from __future__ import annotations

from typing import Annotated

import typer

from fusedpo.cli import judging
from fusedpo.cli.command import Result


def judge(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A.jsonl", help="Answers: prompt and completion in each line, from whatever."
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B.jsonl", help="Other answers to the same prompts.")],
    *,
    judge: judging.JudgeName,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Replies are kept here, and what is here is not asked again."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write every comparison, as JSONL.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the bootstrap interval.")] = 0,
    resamples: Annotated[
        int, typer.Option(metavar="N", help="Of the bootstrap interval.")
    ] = 10_000,
    judge_model: judging.JudgeModel = None,
    judge_key: judging.JudgeKey = None,
    judge_body: judging.JudgeBody = None,
    template: judging.Template = None,
    timeout: judging.Timeout = None,
    retries: judging.Retries = None,
    concurrency: judging.Concurrency = None,
    requests_per_minute: judging.RequestsPerMinute = None,
) -> Result:
    """Compare two sets of answers pair by pair, in both orders: wins, flips, lengths."""
    from fusedpo.tools.judge import judge as run

    report = run(
        a,
        b,
        judge=judging.find_judge(
            judge,
            model=judge_model,
            key=judge_key,
            body=judge_body,
            asking=judging.asking_options(timeout, retries, concurrency, requests_per_minute),
        ),
        cache=cache,
        output=output,
        seed=seed,
        resamples=resamples,
        progress=judging.Bar("replies"),
        **judging.read_template(template),
    )
    return Result(report.as_dict(), report.render())
