"""A record of each form as a value. All raise `FormatError` with what must hold."""

from __future__ import annotations

from typing import Any

from .columns import Columns
from .display import listed
from .messages import check_completion, check_prompt, messages_of, split_conversations, text_of
from .rows import FormatError, LabelledCompletion, Message, PreferencePair, Value
from .templates import HH


def _column(record: Columns, name: str) -> Any:
    if name not in record:
        raise FormatError(f"the column {name} is missing; got {listed(record) or 'none'}")
    return record[name]


def _text(record: Columns, name: str) -> str:
    return text_of(_column(record, name), name)


def _only_one(record: Columns, *names: str) -> str:
    """Which of several columns for the same thing the record has."""
    found = [name for name in names if name in record]
    if len(found) != 1:
        got = " and ".join(found) or "none"
        raise FormatError(f"there must be one of the columns {', '.join(names)}; got {got}")
    return found[0]


def _label(record: Columns) -> bool:
    name = _only_one(record, "label", "kto_tag")
    value = record[name]
    if isinstance(value, (str, bool, int, float)):
        for label, names in ((True, ("true", "1", "1.0")), (False, ("false", "0", "0.0"))):
            if str(value).strip().lower() in names:
                return label
    raise FormatError(f"{name} must be true or false, or 1 or 0; got {value!r}")


def preference(record: Columns) -> PreferencePair:
    _refuse_system(record)
    return PreferencePair(*(_text(record, name) for name in ("prompt", "chosen", "rejected")))


def conversational(record: Columns) -> PreferencePair:
    chosen, rejected = (messages_of(_column(record, n), n) for n in ("chosen", "rejected"))
    given = record.get("prompt")
    whole = any(turns and turns[0]["role"] != "assistant" for turns in (chosen, rejected))
    if given is None or (whole and isinstance(given, str)):
        prompt, chosen, rejected = split_conversations(chosen, rejected)
        if given is not None and given not in [message["content"] for message in prompt]:
            raise FormatError(
                "chosen and rejected are whole conversations, so prompt must repeat one of their "
                f"messages; got {given[:40]!r}"
            )
        return PreferencePair(_with_system(record, prompt), chosen, rejected)
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    prompt = check_prompt(messages_of(given, "prompt"), "prompt")
    chosen, rejected = (
        turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
        for turns in (chosen, rejected)
    )
    return PreferencePair(
        _with_system(record, prompt),
        check_completion(chosen, "chosen"),
        check_completion(rejected, "rejected"),
    )


def sharegpt(record: Columns) -> PreferencePair:
    prompt = messages_of(_column(record, "conversations"), "conversations")
    return PreferencePair(
        check_prompt(_with_system(record, prompt), "conversations"),
        check_completion(messages_of(_column(record, "chosen"), "chosen"), "chosen"),
        check_completion(messages_of(_column(record, "rejected"), "rejected"), "rejected"),
    )


def hh(record: Columns) -> PreferencePair:
    transcripts = []
    for name in ("chosen", "rejected"):
        turns = HH.parse(_text(record, name))
        if turns is None:
            raise FormatError(
                f"{name} must be a transcript that begins with {HH.openings['user']!r}; "
                f"got {record[name][:40]!r}. Plain texts need a column prompt"
            )
        transcripts.append(turns)
    prompt, chosen, rejected = split_conversations(*transcripts)
    return PreferencePair(_with_system(record, prompt), chosen, rejected)


def kto(record: Columns) -> LabelledCompletion:
    label = _label(record)
    name = _only_one(record, "completion", "messages", "conversations")
    if name == "completion":
        if isinstance(_column(record, "prompt"), str):
            _refuse_system(record)
            return LabelledCompletion(_text(record, "prompt"), _text(record, "completion"), label)
        prompt = _with_system(record, messages_of(record["prompt"], "prompt"))
        completion = messages_of(record["completion"], "completion")
    else:
        turns = _with_system(record, messages_of(_column(record, name), name))
        prompt, completion = turns[:-1], turns[-1:]
    return LabelledCompletion(
        check_prompt(prompt, "what comes before the completion"),
        check_completion(completion, "the completion"),
        label,
    )


def instruction(record: Columns) -> Value:
    prompt = _instruction_prompt(record)
    if _only_one(record, "chosen", "output") == "chosen":
        answers = [_text(record, "chosen"), _text(record, "rejected")]
    elif isinstance(output := record["output"], list):
        if len(output) != 2:
            raise FormatError(f"output must have two answers, the better first; got {len(output)}")
        answers = [text_of(answer, f"output[{index}]") for index, answer in enumerate(output)]
    else:
        # A demonstration without a label is there because it is good.
        label = _label(record) if {"label", "kto_tag"} & set(record) else True
        return LabelledCompletion(prompt, _answer(_text(record, "output")), label)
    return PreferencePair(prompt, *(_answer(answer) for answer in answers))


def _instruction_prompt(record: Columns) -> list[Message]:
    turns = _with_system(record, [])
    history = record.get("history") or []  # an empty cell of a CSV is a text
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


def _with_system(record: Columns, turns: list[Message]) -> list[Message]:
    """The turns after the system message that some files keep in a column of its own."""
    if not record.get("system"):
        return turns
    system = {"role": "system", "content": _text(record, "system")}
    if not turns or turns[0]["role"] != "system":
        return [system, *turns]
    if turns[0] != system:
        raise FormatError(
            "there must be one system message; got one in the column system and another one in "
            "the messages"
        )
    return turns


def _refuse_system(record: Columns) -> None:
    if record.get("system"):
        raise FormatError(
            "a column system needs a prompt of messages, as texts have no roles; write prompt and "
            "completions as messages, or put the system's text into prompt"
        )
