"""Conversations written as one text: hh transcripts, chatml, llama and zephyr; and read back.

A text tokenised for training gets its BOS and EOS from the tokenizer, so none is written here. A
completion ends with the mark that ends a turn, without the line break that some forms put after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .rows import FormatError, Message


@dataclass(frozen=True)
class Template:
    """How a turn is written: opening of its role, gap, content, closing, between.

    A prompt ends with the assistant's opening; a completion begins with the gap.
    """

    name: str
    openings: Mapping[str, str]  # role -> what a turn of that role begins with
    gap: str = ""  # between opening and content; may be missing in what is read
    closing: str = ""
    between: str = ""  # after a closing, except at the end of a completion

    @property
    def generation(self) -> str:
        """What a prompt ends with."""
        return self.openings["assistant"]

    def render(
        self, prompt: list[Message], completions: Sequence[list[Message]]
    ) -> tuple[str, list[str]]:
        """Return the prompt and its completions as texts.

        Raises:
            FormatError: a content has one of the template's own marks.
        """
        return self._turns(prompt) + self.generation, [
            self._turns(turns).removeprefix(self.generation).removesuffix(self.between)
            for turns in completions
        ]

    def read(
        self, prompt: str, completions: Sequence[str]
    ) -> tuple[list[Message], list[list[Message]]]:
        """Return the turns of what `render` wrote; the assistant's opening may also be where each
        completion begins.

        Raises:
            FormatError: the texts are not wholly of this template.
        """
        opened = prompt.removesuffix(self.gap)
        if opened.endswith(self.generation):
            prompt = opened.removesuffix(self.generation)
            completions = [self.generation + completion for completion in completions]
        turns = [self.parse(text) for text in completions]
        head = self.parse(prompt, ended=True) if prompt else []
        if head is None or None in turns:
            raise FormatError(
                f"the texts begin as the template {self.name} and do not go on so; the prompt must "
                f"end with {self.generation!r}; got {prompt[-40:]!r}"
            )
        return head, [each for each in turns if each is not None]

    def parse(self, text: str, *, ended: bool = False) -> list[Message] | None:
        """Return the turns of a text; None if it is not wholly of this template.

        The last turn is that of a completion, which may lack its end, unless it is `ended`.
        """
        pieces = self._split(text)
        if not pieces:
            return None
        turns = []
        for left, (opening, content) in enumerate(reversed(pieces)):
            ends = [self.closing + self.between]
            if left == 0 and not ended:
                ends += [self.closing, ""]
            end = next((end for end in ends if content.endswith(end)), None)
            if end is None:
                return None
            content = content.removesuffix(end).removeprefix(self.gap)
            turns.append({"role": self._role(opening), "content": content})
        return turns[::-1]

    def begins(self, text: str) -> bool:
        return text.startswith(tuple(self.openings.values()))

    def mark_in(self, text: str) -> str | None:
        """The opening of a turn that the text has somewhere; None if there is none."""
        return next((mark for mark in self.openings.values() if mark in text), None)

    def _split(self, text: str) -> list[tuple[str, str]]:
        marks = "|".join(re.escape(mark) for mark in self.openings.values())
        before, *rest = re.split(f"({marks})", text)
        return [] if before else list(zip(rest[::2], rest[1::2], strict=True))

    def _role(self, opening: str) -> str:
        return next(role for role, mark in self.openings.items() if mark == opening)

    def _turns(self, messages: list[Message]) -> str:
        return "".join(self._turn(message) for message in messages)

    def _turn(self, message: Message) -> str:
        role, content = message["role"], message["content"]
        marks = [mark.rstrip("\n") for mark in (*self.openings.values(), self.closing) if mark]
        found = next((mark for mark in marks if mark in content), None)
        if found is not None:
            raise FormatError(
                f"a message of the {role} has {found!r} in it, a mark of the template {self.name}"
            )
        return self.openings[role] + self.gap + content + self.closing + self.between


def _by_role(pattern: str, system: str, user: str, assistant: str) -> dict[str, str]:
    names = {"system": system, "user": user, "assistant": assistant}
    return {role: pattern.format(name) for role, name in names.items()}


HH = Template("hh", _by_role("\n\n{}:", "System", "Human", "Assistant"), gap=" ")
CHATML = Template(
    "chatml",
    _by_role("<|im_start|>{}\n", "system", "user", "assistant"),
    closing="<|im_end|>",
    between="\n",
)
LLAMA = Template(  # of Llama 3
    "llama",
    _by_role("<|start_header_id|>{}<|end_header_id|>\n\n", "system", "user", "assistant"),
    closing="<|eot_id|>",
)
ZEPHYR = Template(
    "zephyr",
    _by_role("<|{}|>\n", "system", "user", "assistant"),
    closing="</s>",
    between="\n",
)
TEMPLATES = {template.name: template for template in (HH, CHATML, LLAMA, ZEPHYR)}
