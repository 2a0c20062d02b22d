"""The forms that preference data comes in: how each is recognised, and read into a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import parsers
from .columns import Columns
from .messages import is_message, is_messages
from .rows import Value
from .templates import HH


@dataclass(frozen=True)
class Form:
    """One way to keep preference data."""

    name: str
    looks_like: str  # for the message about a file that has no known form
    fits: Callable[[Columns], bool]
    parse: Callable[[Columns], Value]  # raises FormatError

    def matches(self, record: Mapping[str, Any]) -> bool:
        """Whether a row looks like this form."""
        return self.fits(Columns(record))


def from_record(record: Mapping[str, Any], form: str) -> Value:
    """Return the value of one row.

    Args:
        record: the row, as its file has it.
        form: a name in `FORMS`.

    Raises:
        FormatError: the row is not of that form; the message says what must hold.
        ValueError: no such form.

    >>> from_record({"instruction": "Add.", "input": "1 1", "output": ["2", "3"]}, "instruction")
    PreferencePair(prompt=[{'role': 'user', 'content': 'Add.\\n\\n1 1'}], \
chosen=[{'role': 'assistant', 'content': '2'}], rejected=[{'role': 'assistant', 'content': '3'}])
    """
    return form_named(form).parse(Columns(record))


def form_named(name: str) -> Form:
    if name not in FORMS:
        raise ValueError(f"the form must be one of {', '.join(FORMS)}; got {name!r}.")
    return FORMS[name]


def _are_texts(record: Columns, *names: str) -> bool:
    return all(isinstance(record.get(name), str) for name in names)


def _are_transcripts(record: Columns) -> bool:
    return _are_texts(record, "chosen", "rejected") and all(
        HH.begins(record[name]) for name in ("chosen", "rejected")
    )


def _is_kto(record: Columns) -> bool:
    labelled = "label" in record or "kto_tag" in record
    return labelled and (
        ("prompt" in record and "completion" in record)
        or is_messages(record.get("messages"))
        or is_messages(record.get("conversations"))
    )


def _is_pair_of_messages(record: Columns) -> bool:
    return all(
        is_messages(record.get(n)) or is_message(record.get(n)) for n in ("chosen", "rejected")
    )


FORMS = {
    form.name: form
    for form in (
        Form(
            "preference",
            "prompt, chosen, rejected: texts",
            lambda r: _are_texts(r, "prompt", "chosen", "rejected"),
            parsers.preference,
        ),
        Form(
            "conversational",
            "prompt, chosen, rejected: lists of messages (without prompt: whole conversations)",
            lambda r: _is_pair_of_messages(r) and "conversations" not in r,
            parsers.conversational,
        ),
        Form(
            "sharegpt",
            "conversations: a list of messages; chosen, rejected: a message each",
            lambda r: _is_pair_of_messages(r) and is_messages(r.get("conversations")),
            parsers.sharegpt,
        ),
        Form(
            "hh",
            "chosen, rejected: transcripts that begin with \\n\\nHuman:",
            lambda r: _are_transcripts(r) and not {"prompt", "instruction"} & set(r),
            parsers.hh,
        ),
        Form(
            "kto",
            "prompt, completion, label; or messages (or conversations) and label",
            _is_kto,
            parsers.kto,
        ),
        Form(
            "instruction",
            "instruction, perhaps input, system, history; and chosen and rejected, or output",
            lambda r: "instruction" in r and ("output" in r or _are_texts(r, "chosen", "rejected")),
            parsers.instruction,
        ),
    )
}
