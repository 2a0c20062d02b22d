"""`fusedpo generate` and `fusedpo pathologies`."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import typer

from fusedpo.cli.command import Result

_TITLE = "Generations of"

Patterns = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Patterns and limits of your own, which extend the package's."
    ),
]


def generate(
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS",
            help="Rows with a prompt, text or messages, or preference data (.jsonl, .json, .csv, "
            ".parquet); or a prompt on each line (.txt).",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="M",
            help="A path or a name on the Hub; of a model, or of a PEFT adapter.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            metavar="FILE.jsonl",
            help="Where the generations go; a page to read is written beside it.",
            show_default=False,
        ),
    ],
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR", help="A PEFT adapter to put on the model.")
    ] = None,
    n: Annotated[int, typer.Option(help="Samples for each prompt.")] = 1,
    limit: Annotated[int | None, typer.Option(help="The first so many prompts only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="A completion is cut there.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of the likeliest tokens with that share.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Of so many likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Another one gives other samples.")] = 0,
    batch_size: Annotated[
        int, typer.Option(help="Completions at once; decides memory and speed, not what is made.")
    ] = 8,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the weights; auto: as saved."),
    ] = "auto",
) -> Result:
    """Sample completions of a model for a file of prompts; the same ones at every batch size."""
    from fusedpo.tools.generate import generate as run
    from fusedpo.tools.generations import as_markdown, read_prompts, write_generations, write_text

    file = pathlib.Path(output)
    if file.suffix != ".jsonl":
        raise ValueError(f"output must end in .jsonl; got {output}.")
    page = file.with_suffix(".md")
    _check_place(prompts, file, page)
    start = time.perf_counter()
    with _progress() as progress:
        made = run(
            model,
            read_prompts(prompts, limit),
            adapter=adapter,
            n=n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            batch_size=batch_size,
            dtype=dtype,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    write_generations(file, made)
    write_text(page, as_markdown(made, f"{_TITLE} {model}"))
    tokens, cut = sum(each.num_tokens for each in made), sum(each.truncated for each in made)
    report = {
        "output": output,
        "page": str(page),
        "prompts": len(made) // n,
        "completions": len(made),
        "tokens": tokens,
        "truncated": cut,
        "seconds": seconds,
    }
    text = (
        f"{output}: {len(made)} completions of {len(made) // n} prompts; {page} to read\n"
        f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s; "
        f"{cut} completions were cut at {max_new_tokens} tokens"
    )
    return Result(report, text)


def pathologies(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES",
            help="JSONL with prompt and completion, one file for each checkpoint; or the folder "
            "that a GenerationCallback wrote.",
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The reference model's answers to the same prompts, for verbosity. In a "
            "callback's folder: those from before the training.",
        ),
    ] = None,
    patterns: Patterns = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Draw the shares and the lengths.")
    ] = None,
) -> Result:
    """Count verbosity, flattery, evasion, hedging, repetition and degenerate text."""
    from fusedpo.tools.checkpoints import check_files, draw

    report = check_files(files, reference=reference, patterns=patterns)
    if plot is not None:
        draw(report, plot)
    return Result(report.as_dict(), report.render())


def _check_place(prompts: str, output: pathlib.Path, page: pathlib.Path) -> None:
    """Refuse to write over what was not generated."""
    if output.resolve() == pathlib.Path(prompts).resolve():
        raise ValueError(f"output must be another file than the prompts; both are {output}.")
    if page.exists() and not page.read_bytes().startswith(f"# {_TITLE} ".encode()):
        raise ValueError(
            f"output must leave {page} alone, which is no page of generations but would be "
            "written over; name another file."
        )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Completions made, rate and time left, on stderr."""
    from tqdm import tqdm

    # A terminal is redrawn often, a log file gets a line now and then.
    interval = 0.2 if sys.stderr.isatty() else 15.0
    with tqdm(desc="generating", unit=" completions", mininterval=interval, delay=1) as bar:

        def show(made: int, total: int) -> None:
            bar.total = total
            bar.update(made - bar.n)

        yield show
