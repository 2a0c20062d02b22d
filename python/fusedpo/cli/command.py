"""What every subcommand shares: --json and --debug, exit codes, errors, signals.

A subcommand is a plain function with typer's annotations that returns a `Result`. It prints
nothing: results go to stdout (with --json as one JSON object), everything else to stderr.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import rich
import typer

from fusedpo import StoreError
from fusedpo.cli.output import is_main_process


class Result(NamedTuple):
    report: dict[str, Any]  # for --json
    text: Any  # for people: a string, or anything that rich prints
    code: int = 0


class Interrupted(BaseException):
    """A signal asked to stop. Not an Exception, so that nothing on the way swallows it."""

    def __init__(self, number: int) -> None:
        self.number = number


Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")]
_TELLING = (StoreError, ValueError, TypeError, OSError, ImportError, RuntimeError)


def command(name: str, function: Callable[..., Result]) -> Callable[..., None]:
    """`function` as typer's command `name`, with --json and --debug."""

    @functools.wraps(function)
    def run(*, json: bool, debug: bool, **options: Any) -> None:
        raise typer.Exit(_run(name, functools.partial(function, **options), json, debug))

    signature = inspect.signature(function, eval_str=True)
    shared = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for key, kind in (("json", Json), ("debug", Debug))
    ]
    own = list(signature.parameters.values())
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own, *shared], return_annotation=None
    )
    # typer reads the types from here, and would follow __wrapped__ to the function's own.
    run.__annotations__ = {each.name: each.annotation for each in [*own, *shared]}
    del run.__wrapped__
    return run


def _run(name: str, function: Callable[[], Result], as_json: bool, debug: bool) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the encoding of the terminal lacks is shown as ?, and stops nothing.
        sys.stdout.reconfigure(errors="replace")
    try:
        with _signals_raise():
            result = function()
    except Interrupted as stop:
        signal_name = signal.Signals(stop.number).name
        message = f"stopped by {signal_name}. What was done is kept; run it again to go on."
        return _fail(name, as_json, message, 128 + stop.number)
    except Exception as error:
        if debug:
            raise
        return _fail(name, as_json, _told(error), 1)
    finally:
        _leave_process_group()
    if is_main_process():
        if as_json:
            print(json.dumps(result.report, indent=2))
        elif isinstance(result.text, str):
            print(result.text)
        else:
            rich.print(result.text)
    return result.code


def _told(error: Exception) -> str:
    """The message of an error; with its type, where that is none whose messages stand alone."""
    message, name = str(error).strip(), type(error).__name__
    if message and isinstance(error, _TELLING):
        return message
    return f"{name}: {message}" if message else name


def _fail(name: str, as_json: bool, message: str, code: int) -> int:
    if as_json and is_main_process():
        print(json.dumps({"error": message, "exit_code": code}, indent=2))
    print(f"fusedpo {name}: {message}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise, so that files are closed; also where we were started with SIGINT
    ignored, as in the background of a shell without job control."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _leave_process_group() -> None:
    torch_distributed = sys.modules.get("torch.distributed")
    if torch_distributed is not None and torch_distributed.is_initialized():
        torch_distributed.destroy_process_group()
