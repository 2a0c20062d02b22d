"""Values as records: each form that can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .conversations import as_messages, as_texts
from .forms import from_record
from .renderers import Renderer
from .rows import FormatError, Message, PreferencePair, Value
from .templates import HH

PAIRED = ("preference", "conversational", "sharegpt", "hh")
TARGETS = (*PAIRED, "kto", "unpaired")
RENDERED = ("preference", "unpaired")  # of which a template decides how they look


def to_record(value: Value, target: str, renderer: Renderer | None = None) -> dict[str, Any]:
    """Return the row that a file of that form has for a value.

    Args:
        value: a `PreferencePair` for the forms in `PAIRED`, a `LabelledCompletion` for the others.
        target: a name in `TARGETS`.
        renderer: how conversations are written as texts. None: `preference` as hh transcripts, and
            texts as they are; `unpaired` as it is.

    Raises:
        FormatError: the form cannot hold the value.
        ValueError: no such form, or a renderer for one that holds messages.

    >>> to_record(PreferencePair("2+2?", "4", "5"), "sharegpt")["conversations"]
    [{'from': 'human', 'value': '2+2?'}]
    """
    check_target(target, renderer)
    return write(shape(value, target, renderer)[0], target)


def shape(value: Value, target: str, renderer: Renderer | None) -> tuple[Value, str | None]:
    """Return the value as the texts or the messages that the form holds.

    Also how texts were read, as `as_messages` tells; None if they did not have to be.

    Raises:
        FormatError: the form cannot hold the value.
    """
    if isinstance(value, PreferencePair) != (target in PAIRED):
        held = "pairs" if target in PAIRED else "completions with a label"
        raise FormatError(f"{target} must hold {held}; got a {type(value).__name__}")
    if target in RENDERED and renderer is None:
        if target == "preference" and isinstance(value.prompt, list):
            value = as_texts(value, HH)
        return value, None
    value, how = as_messages(value)
    return value if renderer is None else as_texts(value, renderer), how


def write(value: Value, target: str) -> dict[str, Any]:
    """Return the row for what `shape` returned.

    Raises:
        FormatError: the form cannot hold the value.
    """
    return _WRITERS[target](value)


def check_target(target: str, renderer: Renderer | None) -> None:
    """Raises:
    ValueError: no such form, or a renderer for one that holds messages.
    """
    if target not in TARGETS:
        raise ValueError(f"the form to write must be one of {', '.join(TARGETS)}; got {target!r}.")
    if renderer is not None and target not in RENDERED:
        raise ValueError(
            f"a template writes texts, for {' and '.join(RENDERED)}; {target} does not take one."
        )


def _sharegpt(value: Any) -> dict[str, Any]:
    return {
        "conversations": [_sharegpt_message(message) for message in value.prompt],
        "chosen": _sharegpt_message(_single(value.chosen, "chosen", "sharegpt")),
        "rejected": _sharegpt_message(_single(value.rejected, "rejected", "sharegpt")),
    }


def _sharegpt_message(message: Message) -> dict[str, str]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"from": names[message["role"]], "value": message["content"]}


def _hh(value: Any) -> dict[str, Any]:
    if not value.prompt:
        raise FormatError("hh must have a prompt, or its transcripts share no turn; got none")
    prompt, (chosen, rejected) = HH.render(value.prompt, [value.chosen, value.rejected])
    record = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    if from_record(record, "hh") != value:
        raise FormatError(
            "hh tells a prompt by the turns that chosen and rejected share; got completions that "
            "begin with the same turns, which would become part of the prompt"
        )
    return record


def _kto(value: Any) -> dict[str, Any]:
    message = _single(value.completion, "the completion", "kto")
    return {"messages": [*value.prompt, message], "label": value.label}


def _single(completion: list[Message], name: str, form: str) -> Message:
    if len(completion) != 1:
        raise FormatError(f"{form} must have one message as {name}; got {len(completion)}")
    return completion[0]


def _as_it_is(value: Any) -> dict[str, Any]:
    return dict(vars(value))


_WRITERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "preference": _as_it_is,
    "conversational": _as_it_is,
    "unpaired": _as_it_is,
    "sharegpt": _sharegpt,
    "hh": _hh,
    "kto": _kto,
}
