"""The forms that preference data comes in: how each is recognised, and read into a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .messages import (
    check_completion,
    check_prompt,
    is_message,
    is_messages,
    messages_of,
    split_conversations,
    text_of,
)
from .rows import FormatError, LabelledCompletion, Message, PreferencePair, Value
from .templates import HH

Record = dict[str, Any]  # a row as it was read; a column that holds nothing is left out


@dataclass(frozen=True)
class Form:
    """One way to keep preference data."""

    name: str
    looks_like: str  # for the message about a file that has no known form
    columns: frozenset[str]  # all that `parse` may read
    matches: Callable[[Record], bool]
    parse: Callable[[Record], Value]  # raises FormatError


def from_record(record: Record, form: str) -> Value:
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
    return form_named(form).parse({k: v for k, v in record.items() if v is not None})


def form_named(name: str) -> Form:
    if name not in FORMS:
        raise ValueError(f"the form must be one of {', '.join(FORMS)}; got {name!r}.")
    return FORMS[name]


def _has(record: Record, *names: str) -> bool:
    return all(name in record for name in names)


def _are_texts(record: Record, *names: str) -> bool:
    return all(isinstance(record.get(name), str) for name in names)


def _column(record: Record, name: str) -> Any:
    if name not in record:
        raise FormatError(f"the column {name} is missing; got {', '.join(record) or 'none'}")
    return record[name]


def _text(record: Record, name: str) -> str:
    return text_of(_column(record, name), name)


def _label(record: Record) -> bool:
    name = "kto_tag" if "kto_tag" in record else "label"
    value = _column(record, name)
    known = {"true": True, "1": True, "false": False, "0": False}
    label = known.get(str(value).lower()) if isinstance(value, (bool, int, str)) else None
    if label is None:
        raise FormatError(f"{name} must be true or false, or 1 or 0; got {value!r}")
    return label


# Each form --------------------------------------------------------------------------------------


def _preference(record: Record) -> PreferencePair:
    return PreferencePair(*(_text(record, name) for name in ("prompt", "chosen", "rejected")))


def _conversational(record: Record) -> PreferencePair:
    chosen, rejected = (messages_of(_column(record, n), n) for n in ("chosen", "rejected"))
    if isinstance(record.get("prompt"), list):
        return PreferencePair(
            check_prompt(messages_of(record["prompt"], "prompt"), "prompt"),
            check_completion(chosen, "chosen"),
            check_completion(rejected, "rejected"),
        )
    # Whole conversations; a prompt that is a text repeats the first question.
    return PreferencePair(*split_conversations(chosen, rejected))


def _sharegpt(record: Record) -> PreferencePair:
    prompt = messages_of(_column(record, "conversations"), "conversations")
    return PreferencePair(
        check_prompt([*_system(record), *prompt], "conversations"),
        check_completion(messages_of(_column(record, "chosen"), "chosen"), "chosen"),
        check_completion(messages_of(_column(record, "rejected"), "rejected"), "rejected"),
    )


def _hh(record: Record) -> PreferencePair:
    transcripts = []
    for name in ("chosen", "rejected"):
        turns = HH.parse(_text(record, name))
        if turns is None:
            raise FormatError(
                f"{name} must be a transcript that begins with {HH.openings['user']!r}; "
                f"got {record[name][:40]!r}. Plain texts need a column prompt"
            )
        transcripts.append(turns)
    return PreferencePair(*split_conversations(*transcripts))


def _kto(record: Record) -> LabelledCompletion:
    label = _label(record)
    if _has(record, "completion"):
        if _are_texts(record, "prompt", "completion"):
            return LabelledCompletion(_text(record, "prompt"), _text(record, "completion"), label)
        prompt = messages_of(_column(record, "prompt"), "prompt")
        completion = messages_of(record["completion"], "completion")
    else:
        name = "conversations" if "conversations" in record else "messages"
        turns = [*_system(record), *messages_of(_column(record, name), name)]
        prompt, completion = turns[:-1], turns[-1:]
    return LabelledCompletion(
        check_prompt(prompt, "what comes before the completion"),
        check_completion(completion, "the completion"),
        label,
    )


def _instruction(record: Record) -> Value:
    prompt = _instruction_prompt(record)
    output = record.get("output")
    if _has(record, "chosen", "rejected"):
        answers = [_text(record, "chosen"), _text(record, "rejected")]
    elif isinstance(output, list):
        if len(output) != 2:
            raise FormatError(f"output must have two answers, the better first; got {len(output)}")
        answers = [text_of(answer, f"output[{index}]") for index, answer in enumerate(output)]
    else:
        # A demonstration without a label is there because it is good.
        label = _label(record) if "label" in record or "kto_tag" in record else True
        return LabelledCompletion(prompt, _answer(_text(record, "output")), label)
    return PreferencePair(prompt, *(_answer(answer) for answer in answers))


def _instruction_prompt(record: Record) -> list[Message]:
    turns = _system(record)
    history = record.get("history", [])
    if not isinstance(history, list) or any(
        not isinstance(h, list) or len(h) != 2 for h in history
    ):
        raise FormatError("history must be a list of [question, answer]")
    for index, (question, answer) in enumerate(history):
        turns.append({"role": "user", "content": text_of(question, f"history[{index}][0]")})
        turns.append({"role": "assistant", "content": text_of(answer, f"history[{index}][1]")})
    question = _text(record, "instruction")
    if record.get("input"):
        question += "\n\n" + _text(record, "input")
    return [*turns, {"role": "user", "content": question}]


def _answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _system(record: Record) -> list[Message]:
    """The system message that some files keep in a column of its own."""
    return [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []


def _is_kto(record: Record) -> bool:
    labelled = "label" in record or "kto_tag" in record
    return labelled and (
        _has(record, "prompt", "completion")
        or is_messages(record.get("messages"))
        or is_messages(record.get("conversations"))
    )


def _is_pair_of_messages(record: Record) -> bool:
    return all(
        is_messages(record.get(n)) or is_message(record.get(n)) for n in ("chosen", "rejected")
    )


FORMS = {
    form.name: form
    for form in (
        Form(
            "preference",
            "prompt, chosen, rejected: texts",
            frozenset(("prompt", "chosen", "rejected")),
            lambda r: _are_texts(r, "prompt", "chosen", "rejected"),
            _preference,
        ),
        Form(
            "conversational",
            "prompt, chosen, rejected: lists of messages (without prompt: whole conversations)",
            frozenset(("prompt", "chosen", "rejected")),
            lambda r: _is_pair_of_messages(r) and "conversations" not in r,
            _conversational,
        ),
        Form(
            "sharegpt",
            "conversations: a list of messages; chosen, rejected: a message each",
            frozenset(("conversations", "chosen", "rejected", "system")),
            lambda r: _is_pair_of_messages(r) and is_messages(r.get("conversations")),
            _sharegpt,
        ),
        Form(
            "hh",
            "chosen, rejected: transcripts that begin with \\n\\nHuman:",
            frozenset(("chosen", "rejected")),
            lambda r: (
                _are_texts(r, "chosen", "rejected") and not {"prompt", "instruction"} & set(r)
            ),
            _hh,
        ),
        Form(
            "kto",
            "prompt, completion, label; or messages (or conversations) and label",
            frozenset(
                ("prompt", "completion", "messages", "conversations", "label", "kto_tag", "system")
            ),
            _is_kto,
            _kto,
        ),
        Form(
            "instruction",
            "instruction, perhaps input, system, history; and chosen and rejected, or output",
            frozenset(
                (
                    *("instruction", "input", "system", "history", "chosen", "rejected"),
                    *("output", "label", "kto_tag"),
                )
            ),
            lambda r: "instruction" in r and ("output" in r or _are_texts(r, "chosen", "rejected")),
            _instruction,
        ),
    )
}
