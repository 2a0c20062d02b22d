"""`fusedpo pairs`."""

from __future__ import annotations

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
    max_new_tokens: judging.MaxNewTokens = 256,
    temperature: judging.Temperature = 1.0,
    top_p: judging.TopP = 1.0,
    top_k: judging.TopK = None,
    seed: judging.Seed = 0,
    batch_size: judging.BatchSize = 8,
    dtype: judging.Dtype = "auto",
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
            help="Sent with each request, beside temperature, top_p and seed. Default: "
            '{"max_tokens": 256}, or what --max-new-tokens says.',
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
        sampling=Sampling(n, max_new_tokens, temperature, top_p, top_k, seed, batch_size),
        dtype=dtype,
        near_duplicate=near_duplicate,
        progress=judging.Bars(),
        **judging.read_template(template),
    )
    return Result(report.as_dict(), report.render())


def _model(
    name: str, served: dict[str, str | None], max_new_tokens: int, asking: dict[str, Any]
) -> str | Endpoint:
    if not judging.is_address(name):
        judging.refuse_without_server("--model", name, served)
        return name
    model, key, body = served.values()
    body = body or f'{{"max_tokens": {max_new_tokens}}}'
    return judging.endpoint(name, "--served-model", model=model, key=key, body=body, **asking)
