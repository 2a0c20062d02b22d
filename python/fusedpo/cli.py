"""The `fusedpo` command: one thin function for each subcommand; what they do is in the library.

Results go to stdout (with --json as one JSON object), everything else to stderr. Exit codes:
0 done; 1 it failed, or a check found something; 2 wrong usage; 130 and 143 interrupted by Ctrl-C
and by SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import fusedpo
from fusedpo import RefStore, StoreError
from fusedpo import _cli_output as output
from fusedpo._cli_arguments import make_parser
from fusedpo._precompute.filling import open_store
from fusedpo._precompute.run import reference_of, require_packages
from fusedpo.store import verify

Result = tuple[dict[str, Any], str, int]  # for --json, for people, exit code


class Interrupted(BaseException):
    """A signal asked to stop. Not an Exception, so that nothing on the way swallows it."""

    def __init__(self, number: int) -> None:
        self.number = number


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = make_parser().parse_args(arguments)
    command = _COMMANDS[options.command]
    try:
        with _signals_raise():
            report, text, code = command(options)
    except Interrupted as stop:
        name = signal.Signals(stop.number).name
        message = f"stopped by {name}. What was scored is kept; run it again to go on."
        return _fail(options, message, 128 + stop.number)
    except Exception as error:
        if options.debug:
            raise
        return _fail(options, _told(error), 1)
    finally:
        _leave_process_group()
    if output.is_main_process():
        print(json.dumps(report, indent=2) if options.json else text)
    return code


_SHARE_PROMPTS: dict[str, str | bool] = {"auto": "auto", "always": True, "never": False}
_TELLING = (StoreError, ValueError, TypeError, OSError, ImportError, RuntimeError)


def _told(error: Exception) -> str:
    """The message of an error; with its type, where that is none whose messages stand alone."""
    message, name = str(error).strip(), type(error).__name__
    if message and isinstance(error, _TELLING):
        return message
    return f"{name}: {message}" if message else name


def _fail(options: argparse.Namespace, message: str, code: int) -> int:
    if options.json and output.is_main_process():
        print(json.dumps({"error": message, "exit_code": code}, indent=2))
    print(f"fusedpo {options.command}: {message}", file=sys.stderr)
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


# Commands ---------------------------------------------------------------------------------------


def _precompute(options: argparse.Namespace) -> Result:
    report = fusedpo.precompute(
        options.model,
        options.data,
        options.output,
        split=options.split,
        ref_adapter=options.ref_adapter,
        max_length=options.max_length,
        truncation_mode=options.truncation_mode,
        dtype=options.dtype,
        autocast=options.autocast,
        revision=options.revision,
        attn_implementation=options.attn_implementation,
        max_tokens_per_batch=options.max_tokens_per_batch,
        share_prompts=_SHARE_PROMPTS[options.share_prompts],
        per_token=options.per_token,
        verify_sample=options.verify_sample,
        progress=output.ProgressBar() if output.is_main_process() else None,
    )
    failed = report.sample is not None and report.sample.disagreeing > 0
    return report.as_dict(), output.precompute_text(report), 1 if failed else 0


def _inspect(options: argparse.Namespace) -> Result:
    report = RefStore(options.store).inspect()
    return report, output.inspect_text(report), 0


def _verify(options: argparse.Namespace) -> Result:
    report = verify(options.store)
    # The files and problems are named tuples, which JSON would make lists.
    fields = asdict(report)
    for name in ("problems", "notes", "files"):
        fields[name] = [each._asdict() for each in getattr(report, name)]
    return fields, output.verify_text(options.store, report), 0 if report.ok else 1


def _merge(options: argparse.Namespace) -> Result:
    report = _writable(options.store).merge(abandoned=options.abandoned)
    return asdict(report), output.merge_text(options.store, report), 0


def _export(options: argparse.Namespace) -> Result:
    store = RefStore(options.store)
    if options.data is None:
        rows = store.export(options.output)
    else:
        from fusedpo._precompute import tables

        dataset = tables.with_columns(store, *_texts(options, store), **_lengths(options))
        tables.write(dataset, options.output)
        rows = len(dataset)
    return {"output": options.output, "rows": rows}, f"{options.output}: {rows} rows", 0


def _import(options: argparse.Namespace) -> Result:
    require_packages(peft=options.ref_adapter is not None)
    from fusedpo._precompute import tables

    _, identity = reference_of(
        options.model,
        dtype=options.dtype,
        autocast=options.autocast,
        revision=options.revision,
        attn_implementation=options.attn_implementation,
        ref_adapter=options.ref_adapter,
    )
    store = open_store(options.store, identity)
    records = tables.take_columns(store, *_texts(options, store), **_lengths(options))
    report = {"store": options.store, "imported": records, "records": len(store)}
    text = f"{options.store}: imported {records} values; {len(store)} records are there now"
    return report, text, 0


def _prune(options: argparse.Namespace) -> Result:
    from fusedpo._precompute import tables

    store = _writable(options.store)
    report = tables.prune(
        store, *_texts(options, store), **_lengths(options), abandoned=options.abandoned
    )
    return asdict(report), output.merge_text(options.store, report), 0


def _doctor(options: argparse.Namespace) -> Result:
    from fusedpo import _doctor as doctor

    report = doctor.examine()
    return report, doctor.render(report), 1 if report["broken"] else 0


def _texts(options: argparse.Namespace, store: RefStore) -> tuple[Any, Any]:
    """The data set, and the tokenizer of the model that is named, or that made the store."""
    require_packages(peft=False)
    from fusedpo._precompute.data import load_data
    from fusedpo._precompute.reference import load_processing_class

    model = options.model or store.identity.get("info", {}).get("model")
    if not model:
        raise ValueError("the store does not tell its model. Name one: --model M")
    dataset = load_data(options.data, options.split)
    return dataset, load_processing_class(model, options.revision)


def _writable(path: str) -> RefStore:
    RefStore(path)  # says that there is no store, where "a" would ask for what a new one needs
    return RefStore(path, "a")


def _lengths(options: argparse.Namespace) -> dict[str, Any]:
    return {"max_length": options.max_length, "truncation_mode": options.truncation_mode}


_COMMANDS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "precompute": _precompute,
    "inspect": _inspect,
    "verify": _verify,
    "merge": _merge,
    "export": _export,
    "import": _import,
    "prune": _prune,
    "doctor": _doctor,
}
