"""How texts are read here: words, and the turns of a dialogue that is written into one string."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from fusedpo.tools.formats import Message
from fusedpo.tools.formats.marks import TURN

# Scripts without spaces: each character counts as a word, or a Chinese text would have a few.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:['\u2019][^\W_{_UNSPACED}]+)*")


def words(text: str) -> list[str]:
    """Return the words of a text.

    Example:
        >>> words("It's 3 o'clock: 你好!")
        ["It's", '3', "o'clock", '你', '好']
    """
    return _WORD.findall(text)


def plain(value: str | Sequence[Message]) -> str:
    """Return a text, or the contents of messages with a blank line between them."""
    if isinstance(value, str):
        return value
    return "\n\n".join(message["content"] for message in value)


def normal(text: str) -> str:
    """Return the text as it is compared for likeness: white space counts once.

    Example:
        >>> normal(" two\\n words ")
        'two words'
    """
    return " ".join(text.split())


def exact(text: str) -> str:
    """Return the text as rows are compared before one is removed: only its ends are stripped.

    Example:
        >>> exact(" if a:\\r\\n    b\\n")
        'if a:\\n    b'
    """
    return text.strip().replace("\r\n", "\n")


Key = tuple[tuple[str, str], ...]  # (role, text) of each message; the role of a text is ""


def key(value: str | Sequence[Message], compared: Callable[[str], str]) -> Key:
    """Return what is the same for texts, or messages, that are alike; `compared` is how.

    Example:
        >>> key([{"role": "user", "content": " Hi"}], normal)
        (('user', 'Hi'),)
    """
    if isinstance(value, str):
        return (("", compared(value)),)
    return tuple((message["role"], compared(message["content"])) for message in value)


def question(prompt: str | Sequence[Message]) -> str:
    """Return what was asked last: the last message, or the last turn of a written dialogue.

    Example:
        >>> question("\\n\\nHuman: Hi!\\n\\nAssistant: Yes?\\n\\nHuman: Who are you?")
        'Who are you?'
    """
    if not isinstance(prompt, str):
        return prompt[-1]["content"].strip() if prompt else ""
    turns = [turn.strip() for turn in TURN.split(prompt)]
    return next((turn for turn in reversed(turns) if turn), "")
