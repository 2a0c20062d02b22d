"""`fusedpo iterate`."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from fusedpo.cli import judging
from fusedpo.cli.command import Result

ROUNDS = "The rounds"


def iterate(
    prompts: judging.PromptsFile,
    *,
    model: Annotated[
        str,
        typer.Option(
            metavar="M", help="The first policy: a path or a name on the Hub.", show_default=False
        ),
    ],
    judge: judging.JudgeName,
    config: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="The training of every round, as for fusedpo train, without model and dataset.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="A folder for each round; the same command goes on with what is there.",
            show_default=False,
        ),
    ],
    rounds: Annotated[int, typer.Option(metavar="N", rich_help_panel=ROUNDS)] = 3,
    beta: Annotated[
        str | None,
        typer.Option(
            metavar="B[,B...]",
            rich_help_panel=ROUNDS,
            help="One for all rounds, or one for each. Default: the configuration's.",
        ),
    ] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option(metavar="R[,R...]", rich_help_panel=ROUNDS, help="As --beta."),
    ] = None,
    near_duplicate: judging.NearDuplicate = 95.0,
    n: judging.Samples = 4,
    max_new_tokens: judging.MaxNewTokens = None,
    temperature: judging.Temperature = 1.0,
    top_p: judging.TopP = 1.0,
    top_k: judging.TopK = None,
    seed: judging.Seed = 0,
    batch_size: judging.BatchSize = None,
    dtype: judging.Dtype = None,
    judge_model: judging.JudgeModel = None,
    judge_key: judging.JudgeKey = None,
    judge_body: judging.JudgeBody = None,
    template: judging.Template = None,
    timeout: judging.Timeout = None,
    retries: judging.Retries = None,
    concurrency: judging.Concurrency = None,
    requests_per_minute: judging.RequestsPerMinute = None,
) -> Result:
    """Train in rounds: the policy answers, a judge prefers, the next policy learns from that."""
    from fusedpo.tools.iterate import iterate as run
    from fusedpo.tools.sampling import Sampling

    with contextlib.redirect_stdout(sys.stderr):  # transformers prints what it logs
        report = run(
            prompts,
            model=model,
            judge=judging.find_judge(
                judge,
                model=judge_model,
                key=judge_key,
                body=judge_body,
                asking=judging.asking_options(timeout, retries, concurrency, requests_per_minute),
            ),
            config=config,
            output=output,
            rounds=rounds,
            beta=_schedule("--beta", beta),
            learning_rate=_schedule("--learning-rate", learning_rate),
            sampling=Sampling(
                n=n,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                **judging.given(max_new_tokens=max_new_tokens, batch_size=batch_size),
            ),
            **judging.given(dtype=dtype),
            near_duplicate=near_duplicate,
            progress=judging.Bars(),
            **judging.read_template(template),
        )
    return Result(report.as_dict(), report.render())


def _schedule(option: str, text: str | None) -> float | list[float] | None:
    if text is None:
        return None
    try:
        values = [float(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} must be a number, or numbers with commas between; got {text!r}."
        ) from None
    return values[0] if len(values) == 1 else values
