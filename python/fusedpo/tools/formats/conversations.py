"""Values as conversations, and as texts."""

from __future__ import annotations

from .marks import BOS, TURN_OPENS
from .messages import check_completion, check_prompt
from .renderers import Renderer
from .rows import FormatError, LabelledCompletion, Message, PreferencePair, Text, Value
from .templates import TEMPLATES


def completions_of(value: Value) -> list[Text]:
    if isinstance(value, PreferencePair):
        return [value.chosen, value.rejected]
    return [value.completion]


def with_texts(value: Value, prompt: Text, completions: list[Text]) -> Value:
    """`value` with another prompt and completions."""
    if isinstance(value, PreferencePair):
        return PreferencePair(prompt, *completions)
    return LabelledCompletion(prompt, completions[0], value.label)


def as_messages(value: Value) -> tuple[Value, str]:
    """Return the value as lists of messages, and how it was read.

    That is "messages" for what is already so, the name of the template whose marks the texts have,
    "plain" for texts without marks, and "unknown" where the prompt has marks of another template:
    in both the prompt is one message of the user.

    Raises:
        FormatError: marks of a template, but not a whole conversation.

    >>> pair = PreferencePair("\\n\\nHuman: 2+2?\\n\\nAssistant:", " 4", " 5")
    >>> value, how = as_messages(pair)
    >>> value.prompt, value.chosen, how
    ([{'role': 'user', 'content': '2+2?'}], [{'role': 'assistant', 'content': '4'}], 'hh')
    """
    if isinstance(value.prompt, list):
        return value, "messages"
    texts = [text for text in completions_of(value) if isinstance(text, str)]
    text = value.prompt
    if (bos := BOS.match(text)) is not None:
        text = text[bos.end() :]
    begun = next((each for each in TEMPLATES.values() if each.begins(text)), None)
    if begun is not None:
        prompt, completions = begun.read(text, texts)
        check_prompt(prompt, "prompt")
        for completion in completions:
            check_completion(completion, "a completion")
        return with_texts(value, prompt, [*completions]), begun.name
    for template in TEMPLATES.values():
        mark = template.mark_in(text)
        if mark is not None:
            raise FormatError(
                f"prompt has {mark!r}, a mark of the template {template.name}, and does not begin "
                f"with one; got {value.prompt[:40]!r}"
            )
    prompt = [_message("user", value.prompt)] if value.prompt else []
    how = "plain" if TURN_OPENS.search(text) is None else "unknown"
    return with_texts(value, prompt, [[_message("assistant", each)] for each in texts]), how


def as_texts(value: Value, renderer: Renderer) -> Value:
    """Return a value of messages as the texts that `renderer` writes.

    Raises:
        FormatError: the template cannot write it.
    """
    assert isinstance(value.prompt, list)
    completions = [each for each in completions_of(value) if isinstance(each, list)]
    prompt, texts = renderer.render(value.prompt, completions)
    return with_texts(value, prompt, [*texts])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
