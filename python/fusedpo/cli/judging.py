"""What the commands that judge have in common: naming a judge or a model behind HTTP, and showing
how far they are."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from fusedpo.tools.judge import Endpoint, Judge

SERVER = "A judge behind HTTP"
SAMPLING = "How to sample"

JudgeName = Annotated[
    str,
    typer.Option(
        "--judge",
        metavar="J",
        help="module:function, called with (prompt, first, second), that returns A, B or tie; or "
        "the address of an OpenAI-compatible server, such as http://localhost:8000/v1.",
        show_default=False,
    ),
]
JudgeModel = Annotated[
    str | None,
    typer.Option(metavar="M", rich_help_panel=SERVER, help="The model's name at the server."),
]
JudgeKey = Annotated[
    str | None,
    typer.Option(
        metavar="VARIABLE",
        rich_help_panel=SERVER,
        help="Environment variable with the API key. Default: no key is sent.",
    ),
]
JudgeBody = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        rich_help_panel=SERVER,
        help='Sent with each request. Default: {"temperature": 0, "max_tokens": 1024}.',
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=SERVER,
        help="What is asked, with {prompt}, {first} and {second}. Default: the built-in words.",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="S", rich_help_panel=SERVER, help="Seconds for one attempt. Default: 120."
    ),
]
Retries = Annotated[
    int | None,
    typer.Option(
        metavar="N", rich_help_panel=SERVER, help="After failures that may pass. Default: 6."
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(metavar="N", rich_help_panel=SERVER, help="Requests in flight. Default: 8."),
]
RequestsPerMinute = Annotated[
    float | None,
    typer.Option(metavar="N", rich_help_panel=SERVER, help="At most. Default: no limit."),
]


PromptsFile = Annotated[
    str,
    typer.Argument(
        metavar="PROMPTS",
        help=".jsonl or .json with a prompt in each row, text or messages (a file of preferences "
        "will do), or .txt with one on each line.",
    ),
]
Samples = Annotated[
    int, typer.Option("--n", metavar="N", rich_help_panel=SAMPLING, help="Answers to each prompt.")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N", rich_help_panel=SAMPLING, help="An answer is cut there. Default: 256."
    ),
]
Temperature = Annotated[float, typer.Option(metavar="T", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float,
    typer.Option(metavar="P", rich_help_panel=SAMPLING, help="The likeliest tokens of that share."),
]
TopK = Annotated[
    int | None,
    typer.Option(metavar="K", rich_help_panel=SAMPLING, help="So many likeliest tokens."),
]
Seed = Annotated[int, typer.Option(metavar="N", rich_help_panel=SAMPLING)]
BatchSize = Annotated[
    int | None,
    typer.Option(metavar="N", rich_help_panel=SAMPLING, help="Answers at once. Default: 8."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    typer.Option(rich_help_panel=SAMPLING, help="Of the weights. Default: auto, as saved."),
]
NearDuplicate = Annotated[
    float,
    typer.Option(
        metavar="PERCENT",
        help="An answer so like an earlier one of its prompt is left out; 100: the same alone.",
    ),
]


def is_address(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def asking_options(
    timeout: float | None,
    retries: int | None,
    concurrency: int | None,
    requests_per_minute: float | None,
) -> dict[str, Any]:
    """The fields of `Endpoint` that a command line sets."""
    return given(
        timeout=timeout,
        retries=retries,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
    )


def given(**options: Any) -> dict[str, Any]:
    """Those that are on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def find_judge(
    name: str,
    *,
    model: str | None,
    key: str | None,
    body: str | None,
    asking: dict[str, Any],
    other_server: bool = False,
) -> Judge:
    """The judge that a command line names.

    Args:
        name: of a function, or the address of a server.
        model, key, body: what a server needs besides.
        asking: from `asking_options`.
        other_server: whether `asking` is also about another one.
    """
    from fusedpo.tools.judge import load_function

    if is_address(name):
        return endpoint(name, "--judge-model", model=model, key=key, body=body, **asking)
    of_server = {"--judge-model": model, "--judge-key": key, "--judge-body": body}
    if not other_server:
        of_server |= {f"--{option.replace('_', '-')}": value for option, value in asking.items()}
    refuse_without_server("--judge", name, of_server)
    return load_function(name)


def refuse_without_server(option: str, name: str, of_server: dict[str, Any]) -> None:
    """Refuse options of a server where `option` names none."""
    useless = [*given(**of_server)]
    if useless:
        raise ValueError(
            f"{', '.join(useless)} must come with the address of a server; {option} is {name}."
        )


def endpoint(
    address: str, option: str, *, model: str | None, key: str | None, body: str | None, **rest: Any
) -> Endpoint:
    """The server at an address; `option` is the one that names its model."""
    from fusedpo.tools.judge import Endpoint

    if model is None:
        raise ValueError(f"{address} needs the name of its model: {option} M")
    if body is not None:
        rest["body"] = _object(body)
    return Endpoint(address, model, api_key=None if key is None else _secret(key), **rest)


def read_template(path: str | None) -> dict[str, str]:
    """The keyword `template`, where a file is named."""
    return {} if path is None else {"template": pathlib.Path(path).read_text(encoding="utf-8")}


class Bar:
    """Shows on stderr how much is done of how much; called with both."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            # A terminal is redrawn often, a log file gets a line now and then.
            interval = 0.2 if sys.stderr.isatty() else 15.0
            self._bar = tqdm(total=total, initial=done, unit=f" {self._unit}", mininterval=interval)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None


class Bars:
    """A `Bar` for each thing that is told by its name, one after another."""

    def __init__(self) -> None:
        self._bars: dict[str, Bar] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bars.setdefault(what, Bar(what))(done, total)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the body must be a JSON object; got {text!r} ({error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"the body must be a JSON object; got {text!r}.")
    return value


def _secret(variable: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ValueError(
            f"the environment variable {variable} must hold the API key; it is not set."
        )
    return value
