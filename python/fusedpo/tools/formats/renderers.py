"""What writes a conversation as texts: a template by name, plain text, or a tokenizer's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..tokenizer import load_tokenizer
from .rows import FormatError, Message
from .templates import TEMPLATES

RENDERERS = (*TEMPLATES, "plain")


class Renderer(Protocol):
    """Writes a prompt and its completions, such that prompt + completion is the whole text."""

    @property
    def name(self) -> str: ...

    def render(
        self, prompt: list[Message], completions: Sequence[list[Message]]
    ) -> tuple[str, list[str]]: ...


def renderer_named(name: str) -> Renderer:
    """Return the template of that name.

    Raises:
        ValueError: there is none.

    >>> renderer_named("plain").render([{"role": "user", "content": "2+2?"}], [])
    ('2+2?', [])
    """
    if name not in RENDERERS:
        raise ValueError(f"template must be one of {', '.join(RENDERERS)}; got {name!r}.")
    return Plain() if name == "plain" else TEMPLATES[name]


class Plain:
    """The contents alone, a blank line between two. Who said what is lost."""

    name = "plain"

    def render(
        self, prompt: list[Message], completions: Sequence[list[Message]]
    ) -> tuple[str, list[str]]:
        head, *tails = (
            "\n\n".join(message["content"] for message in turns) for turns in (prompt, *completions)
        )
        # A text that brings its own space, as a story that goes on, is left as it is.
        if head and not head[-1].isspace() and not all(tail[:1].isspace() for tail in tails):
            head += "\n\n" if tails else ""
        return head, tails


class TokenizerTemplate:
    """The chat template of a tokenizer, with the ends that TRL expects of texts.

    TRL tokenises texts with the tokenizer's special tokens and ends a completion with EOS. So a BOS
    that the tokenizer adds by itself is left out, and nothing follows an EOS.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.name = f"of {tokenizer.name_or_path}"
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} must have a chat template; it has none. "
                f"Use template={' or '.join(RENDERERS)}."
            )
        self._tokenizer = tokenizer
        adds_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._bos = tokenizer.bos_token if adds_bos else ""
        self._eos = tokenizer.eos_token

    def render(
        self, prompt: list[Message], completions: Sequence[list[Message]]
    ) -> tuple[str, list[str]]:
        head = self._apply(prompt, add_generation_prompt=True)
        tails = []
        for completion in completions:
            whole = self._apply([*prompt, *completion], add_generation_prompt=False)
            if not whole.startswith(head):
                raise FormatError(
                    f"the template {self.name} must write a prompt alike with and without a "
                    f"completion; it writes {head[-40:]!r}, which is not in the whole"
                )
            tails.append(self._until_eos(whole.removeprefix(head)))
        return head.removeprefix(self._bos), tails

    def _apply(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        import jinja2

        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise FormatError(f"the template {self.name} refuses it: {error}") from None
        assert isinstance(text, str)
        return text

    def _until_eos(self, text: str) -> str:
        end = text.rstrip()
        return end if self._eos and end.endswith(self._eos) else text


def tokenizer_template(name_or_path: str) -> TokenizerTemplate:
    """Return the chat template of the tokenizer with that path, or name on the Hub.

    Raises:
        ImportError, OSError, ValueError: no transformers, no such tokenizer, no template.
    """
    return TokenizerTemplate(load_tokenizer(name_or_path))
