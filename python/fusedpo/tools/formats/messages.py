"""Lists of messages as data sets write them, `role`/`content` or `from`/`value`, as `Message`s."""

from __future__ import annotations

from typing import Any

from .rows import FormatError, Message

ROLES = ("system", "user", "assistant")
KEYS = (("role", "content"), ("from", "value"))
_NAMES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
# What a message cannot lose without saying something else.
_NEEDED = ("tool_calls", "function_call", "images", "image", "audio")


def text_of(value: Any, name: str) -> str:
    """Return `value` if it is a text that UTF-8 can hold.

    Raises:
        FormatError: it is not.
    """
    if not isinstance(value, str):
        raise FormatError(f"{name} must be a text; got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise FormatError(
            f"{name} has half a surrogate pair, U+{code:04X}, at character {error.start}; "
            "no UTF-8 file can hold it"
        ) from None
    return value


def is_messages(value: Any) -> bool:
    """Whether this looks like a list of messages, in either way to write them."""
    return isinstance(value, list) and all(is_message(each) for each in value)


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(all(k in value for k in keys) for keys in KEYS)


def messages_of(value: Any, name: str) -> list[Message]:
    """Return a list of messages, or a single one, with `role` and `content`.

    Raises:
        FormatError: not messages, an unknown role, content that is not a text, tool calls.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise FormatError(f"{name} must be a list of messages; got {_kind(value)}")
    return [_message(each, f"{name}[{index}]") for index, each in enumerate(value)]


def _message(value: Any, name: str) -> Message:
    if not is_message(value):
        raise FormatError(
            f"{name} must have role and content, or from and value; got {_kind(value)}"
        )
    role_key, content_key = next(keys for keys in KEYS if all(k in value for k in keys))
    lost = [key for key in _NEEDED if value.get(key)]
    if lost:
        raise FormatError(f"{name} has {lost[0]}, which no form here can hold")
    role = _NAMES.get(value[role_key]) if isinstance(value[role_key], str) else None
    if role is None:
        raise FormatError(
            f"{name}.{role_key} must be one of {', '.join(_NAMES)}; got {value[role_key]!r}"
        )
    return {"role": role, "content": text_of(value[content_key], f"{name}.{content_key}")}


def check_prompt(prompt: list[Message], name: str) -> list[Message]:
    """Raises:
    FormatError: the prompt ends with the assistant, so where the completion begins is unclear.
    """
    if prompt and prompt[-1]["role"] == "assistant":
        raise FormatError(f"{name} must end with a user's message; got the assistant's")
    return prompt


def check_completion(completion: list[Message], name: str) -> list[Message]:
    """Raises:
    FormatError: no message, or the first or last is not the assistant's.
    """
    if not completion:
        raise FormatError(f"{name} must have a message of the assistant; got none")
    for where, message in (("begin", completion[0]), ("end", completion[-1])):
        if message["role"] != "assistant":
            raise FormatError(
                f"{name} must {where} with the assistant's message; got the {message['role']}'s"
            )
    return completion


def split_conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Return (prompt, chosen, rejected) of two whole conversations that begin alike.

    Raises:
        FormatError: they share no turn.
    """
    shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        shared += 1
    # A completion begins with the assistant: where the users differ, the turn before goes with it.
    while shared and not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        shared -= 1
    if not shared:
        raise FormatError("chosen and rejected must begin with the same turns; they share none")
    return (
        check_prompt(chosen[:shared], "the shared part of chosen and rejected"),
        check_completion(chosen[shared:], "chosen"),
        check_completion(rejected[shared:], "rejected"),
    )


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'no keys'}"
    names = {type(None): "nothing", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), f"{value!r}")
