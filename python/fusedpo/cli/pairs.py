"""`fusedpo pairs`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusedpo.cli import judging
from fusedpo.cli.command import Result

if TYPE_CHECKING:
    from fusedpo.tools.judge import Endpoint

SERVER = "A model behind HTTP"


def pairs(
    prompts: judging.PromptsFile,
    *,
    model: Annotated[
        str,
        typer.Option(
            metavar="M",
            help="Who answers: a path or a name on the Hub, of a model or of a PEFT adapter; or "
            "the address of an OpenAI-compatible server.",
            show_default=False,
        ),
    ],
    judge: judging.JudgeName,
    output: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Samples, verdicts and pairs.jsonl; the same command goes on with what is there.",
            show_default=False,
        ),
    ],
    near_duplicate: judging.NearDuplicate = 95.0,
    n: judging.Samples = 4,
    max_new_tokens: judging.MaxNewTokens = None,
    temperature: judging.Temperature = 1.0,
    top_p: judging.TopP = 1.0,
    top_k: judging.TopK = None,
    seed: judging.Seed = 0,
    batch_size: judging.BatchSize = None,
    dtype: judging.Dtype = None,
    served_model: Annotated[
        str | None,
        typer.Option(metavar="M", rich_help_panel=SERVER, help="The model's name at the server."),
    ] = None,
    model_key: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE",
            rich_help_panel=SERVER,
            help="Environment variable with the API key. Default: no key is sent.",
        ),
    ] = None,
    model_body: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            rich_help_panel=SERVER,
            help="Sent with each request, beside temperature, top_p and seed, which have their own "
            'options. Default: {"max_tokens": 256}, or what --max-new-tokens says.',
        ),
    ] = None,
    judge_model: judging.JudgeModel = None,
    judge_key: judging.JudgeKey = None,
    judge_body: judging.JudgeBody = None,
    template: judging.Template = None,
    timeout: judging.Timeout = None,
    retries: judging.Retries = None,
    concurrency: judging.Concurrency = None,
    requests_per_minute: judging.RequestsPerMinute = None,
) -> Result:
    """Make preference pairs from prompts: sample, judge in both orders, keep what is decided."""
    from fusedpo.tools.pairs import make_pairs
    from fusedpo.tools.sampling import Sampling

    asking = judging.asking_options(timeout, retries, concurrency, requests_per_minute)
    report = make_pairs(
        prompts,
        model=_model(
            model,
            {"--served-model": served_model, "--model-key": model_key, "--model-body": model_body},
            {"--batch-size": batch_size, "--dtype": dtype},
            max_new_tokens,
            asking,
        ),
        judge=judging.find_judge(
            judge,
            model=judge_model,
            key=judge_key,
            body=judge_body,
            asking=asking,
            other_server=judging.is_address(model),
        ),
        output=output,
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


def _model(
    name: str,
    served: dict[str, str | None],
    loaded: dict[str, Any],
    max_new_tokens: int | None,
    asking: dict[str, Any],
) -> str | Endpoint:
    """The model that a command line names; `served` and `loaded` are the options of each kind."""
    if not judging.is_address(name):
        judging.refuse_without_server("--model", name, served)
        return name
    useless = [*judging.given(**loaded)]
    if useless:
        raise ValueError(
            f"{', '.join(useless)} must come with a model that is loaded here; --model is {name}, "
            "the address of a server."
        )
    model, key, body = served.values()
    if body is not None and max_new_tokens is not None:
        raise ValueError(
            "--max-new-tokens must not come with --model-body, which takes its place; say there "
            "how long an answer may be, as the server names it."
        )
    body = body or json.dumps({"max_tokens": max_new_tokens or 256})
    return judging.endpoint(name, "--served-model", model=model, key=key, body=body, **asking)
