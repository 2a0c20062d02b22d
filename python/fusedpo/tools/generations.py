"""Prompts and generations in files: JSONL for programs, markdown for people."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from fusedpo.tools.formats import FORMS, FormatError, from_record
from fusedpo.tools.formats.files import read_records
from fusedpo.tools.generate import Generation, Prompt


def read_prompts(path: str | os.PathLike[str], limit: int | None = None) -> list[Prompt]:
    """Return the different prompts of a file, in its order.

    Args:
        path: rows with a `prompt`, text or messages, or preference data of any form that
            `fusedpo.tools.formats` knows (.jsonl, .json, .csv, .parquet); or a prompt on every
            line (.txt).
        limit: the first so many.

    Raises:
        ValueError: another kind of file, a row without prompt, no prompt, or limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all; got {limit}.")
    file = pathlib.Path(path)
    if file.suffix == ".txt":
        lines = file.read_text(encoding="utf-8").split("\n")
        prompts: list[Prompt] = [line for line in lines if line.strip()]
    else:
        prompts = [_prompt(row, where) for where, row in _rows(file)]
    # The same prompt twice would only give the same samples twice.
    different = list({prompt_key(prompt): prompt for prompt in prompts}.values())
    if not different:
        raise ValueError(f"{file} has no prompt.")
    return different[:limit]


def prompt_key(prompt: Prompt) -> str:
    """Return what tells prompts apart, text or messages."""
    return json.dumps(prompt, sort_keys=True)


def read_generations(path: str | os.PathLike[str]) -> list[Generation]:
    """Return the generations of a JSONL file: rows with `prompt` and `completion`; the other fields
    of a `Generation` may be missing.

    Raises:
        ValueError: a row without prompt or completion, or no row.
    """
    file = pathlib.Path(path)
    found = []
    for where, row in _rows(file):
        completion = row.get("completion")
        if not isinstance(completion, str):
            raise ValueError(f"{where}: completion must be a text; got {_short(row)}.")
        known = {name: row[name] for name in ("index", "num_tokens", "truncated") if name in row}
        found.append(Generation(_prompt(row, where), completion, **known))
    if not found:
        raise ValueError(f"{file} has no generation.")
    return found


def write_generations(path: str | os.PathLike[str], generations: Sequence[Generation]) -> None:
    """Write a JSONL file, whole or not at all."""
    lines = [json.dumps(each.as_dict(), ensure_ascii=False) + "\n" for each in generations]
    write_text(path, "".join(lines))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file under another name and rename it, so that no half of it is ever seen."""
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f".{file.name}.{os.getpid()}")
    half.write_text(text, encoding="utf-8")
    half.replace(file)


def as_markdown(generations: Sequence[Generation], title: str) -> str:
    """Return the generations as a page to read, each prompt followed by its completions."""
    lines = [f"# {title}", ""]
    last = None
    for each in generations:
        if each.prompt != last:
            last = each.prompt
            lines += ["## Prompt", "", *_quoted(as_text(each.prompt)), ""]
        cut = ", cut there" if each.truncated else ""
        lines += [f"**Sample {each.index}**, {each.num_tokens} tokens{cut}:", ""]
        lines += [*_fenced(each.completion), ""]
    return "\n".join(lines)


def as_text(prompt: Prompt) -> str:
    """Return a prompt as one text to read; of messages each with its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _quoted(text: str) -> list[str]:
    return [f"> {line}".rstrip() for line in text.strip().split("\n")]


def _fenced(text: str) -> list[str]:
    """A fence that the text itself does not close: completions hold markdown, too."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence + "text", text.strip("\n"), fence]


def _rows(file: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row)."""
    for line, row in read_records(os.fspath(file)):
        where = f"{file}, line {line}"
        if isinstance(row, FormatError):
            raise ValueError(f"{where}: {row}.")
        yield where, row


def _prompt(row: dict[str, Any], where: str) -> Prompt:
    prompt = row.get("prompt")
    if prompt and (isinstance(prompt, str) or _are_messages(prompt)):
        found: Prompt = prompt  # with or without an answer
        return found
    form = next((form for form in FORMS.values() if form.matches(row)), None)
    if form is None:
        raise ValueError(
            f"{where}: a row must have a prompt, a text or messages with role and content, or be "
            f"of a form of preference data; got {_short(row)}."
        )
    try:
        return from_record(row, form.name).prompt
    except FormatError as error:
        raise ValueError(f"{where}: {error}.") from None


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
