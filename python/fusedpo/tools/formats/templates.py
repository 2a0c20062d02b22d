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

    def render(self, prompt: Sequence[Message], completion: Sequence[Message]) -> tuple[str, str]:
        """Return (prompt, completion) as texts; the completion is one turn, or several.

        Raises:
            FormatError: a content has one of the template's own marks.
        """
        head = "".join(self._turn(message) for message in prompt) + self.generation
        tail = "".join(self._turn(message) for message in completion)
        return head, tail.removeprefix(self.generation).removesuffix(self.between)

    def parse(self, text: str) -> list[Message] | None:
        """Return the turns of a text; None if it is not wholly of this template."""
        pieces = self._split(text)
        if not pieces:
            return None
        turns = []
        for index, (opening, content) in enumerate(pieces):
            end = self.closing + self.between
            if index == len(pieces) - 1:
                end = self.closing if not content.endswith(end) else end
            if not content.endswith(end):
                return None
            content = content.removesuffix(end).removeprefix(self.gap)
            turns.append({"role": self._role(opening), "content": content})
        return turns

    def begins(self, text: str) -> bool:
        return text.startswith(tuple(self.openings.values()))

    def _split(self, text: str) -> list[tuple[str, str]]:
        marks = "|".join(re.escape(mark) for mark in self.openings.values())
        before, *rest = re.split(f"({marks})", text)
        return [] if before else list(zip(rest[::2], rest[1::2], strict=True))

    def _role(self, opening: str) -> str:
        return next(role for role, mark in self.openings.items() if mark == opening)

    def _turn(self, message: Message) -> str:
        content = message["content"]
        for mark in (*self.openings.values(), self.closing):
            # The line break that ends an opening is not what makes it one.
            if mark.rstrip("\n") and mark.rstrip("\n") in content:
                raise FormatError(
                    f"a message of the {message['role']} has {mark!r} in it, which the template "
                    f"{self.name} would take for a turn's mark"
                )
        return self.openings[message["role"]] + self.gap + content + self.closing + self.between


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
