"""A record of each form as a value. All raise `FormatError` with what must hold."""

from __future__ import annotations

from typing import Any

from .messages import check_completion, check_prompt, messages_of, split_conversations, text_of
from .rows import FormatError, LabelledCompletion, Message, PreferencePair, Value
from .templates import HH

Record = dict[str, Any]  # a row as it was read; a column that holds nothing is left out


def _column(record: Record, name: str) -> Any:
    if name not in record:
        raise FormatError(f"the column {name} is missing; got {', '.join(record) or 'none'}")
    return record[name]


def _text(record: Record, name: str) -> str:
    return text_of(_column(record, name), name)


def _only_one(record: Record, *names: str) -> str:
    """Which of several columns for the same thing the record has."""
    found = [name for name in names if name in record]
    if len(found) != 1:
        got = " and ".join(found) or "none"
        raise FormatError(f"there must be one of the columns {', '.join(names)}; got {got}")
    return found[0]


def _label(record: Record) -> bool:
    name = _only_one(record, "label", "kto_tag")
    value = record[name]
    known = {"true": True, "1": True, "false": False, "0": False}
    label = known.get(str(value).lower()) if isinstance(value, (bool, int, str)) else None
    if label is None:
        raise FormatError(f"{name} must be true or false, or 1 or 0; got {value!r}")
    return label


def preference(record: Record) -> PreferencePair:
    return PreferencePair(*(_text(record, name) for name in ("prompt", "chosen", "rejected")))


def conversational(record: Record) -> PreferencePair:
    chosen, rejected = (messages_of(_column(record, n), n) for n in ("chosen", "rejected"))
    given = record.get("prompt")
    if isinstance(given, str) and not any(
        m["role"] == "user" for m in (*chosen[:1], *rejected[:1])
    ):
        given = [{"role": "user", "content": given}]
    if given is not None and not isinstance(given, str):
        return PreferencePair(
            check_prompt(messages_of(given, "prompt"), "prompt"),
            check_completion(chosen, "chosen"),
            check_completion(rejected, "rejected"),
        )
    prompt, chosen, rejected = split_conversations(chosen, rejected)
    if given is not None and given not in [message["content"] for message in prompt]:
        raise FormatError(
            "chosen and rejected are whole conversations, so prompt must repeat one of their "
            f"messages; got {given[:40]!r}"
        )
    return PreferencePair(prompt, chosen, rejected)


def sharegpt(record: Record) -> PreferencePair:
    prompt = messages_of(_column(record, "conversations"), "conversations")
    return PreferencePair(
        check_prompt([*_system(record), *prompt], "conversations"),
        check_completion(messages_of(_column(record, "chosen"), "chosen"), "chosen"),
        check_completion(messages_of(_column(record, "rejected"), "rejected"), "rejected"),
    )


def hh(record: Record) -> PreferencePair:
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


def kto(record: Record) -> LabelledCompletion:
    label = _label(record)
    name = _only_one(record, "completion", "messages", "conversations")
    if name == "completion":
        if isinstance(_column(record, "prompt"), str):
            return LabelledCompletion(_text(record, "prompt"), _text(record, "completion"), label)
        prompt = messages_of(record["prompt"], "prompt")
        completion = messages_of(record["completion"], "completion")
    else:
        turns = [*_system(record), *messages_of(_column(record, name), name)]
        prompt, completion = turns[:-1], turns[-1:]
    return LabelledCompletion(
        check_prompt(prompt, "what comes before the completion"),
        check_completion(completion, "the completion"),
        label,
    )


def instruction(record: Record) -> Value:
    prompt = _instruction_prompt(record)
    output = record.get("output")
    if _only_one(record, "chosen", "output") == "chosen":
        answers = [_text(record, "chosen"), _text(record, "rejected")]
    elif isinstance(output, list):
        if len(output) != 2:
            raise FormatError(f"output must have two answers, the better first; got {len(output)}")
        answers = [text_of(answer, f"output[{index}]") for index, answer in enumerate(output)]
    else:
        # A demonstration without a label is there because it is good.
        label = _label(record) if {"label", "kto_tag"} & set(record) else True
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
