"""Read a judge's verdict out of its reply.

A reply is free text, so only forms that leave no doubt count; what contradicts itself, or fits none
of them, is no verdict, and is counted as that rather than guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Literal

Verdict = Literal["A", "B", "tie"]

# C is the tie of the widely used MT-Bench prompt.
_LABELS: dict[str, Verdict] = {
    "a": "A",
    "b": "B",
    "c": "tie",
    "tie": "tie",
    "draw": "tie",
    "equal": "tie",
}
_NOUN = r"(?:answer|assistant|response|option|model)"
_LABEL = r"(?:a|b|tie|draw|equal)"
_KEY = r"(?:verdict|winner|choice|preference|preferred|answer|better(?:\s+(?:answer|response))?)"
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
_MARK = re.compile(r"\[\[\s*(a|b|c|tie)\s*\]\]", re.IGNORECASE)
_JSON_KEYS = ("verdict", "winner", "choice", "preference", "preferred", "better")
_NAMED = re.compile(
    rf"^[\W_]*(?:(?:my|the)\s+)?(?:final\s+)?{_KEY}[*_`\s]*[:=][\W_]*(?:{_NOUN}\s+)?({_LABEL}|c)[\W_]*$",
    re.IGNORECASE | re.MULTILINE,
)
_LAST_LINE = re.compile(
    rf"^[\W_]*(?:(?:the\s+)?winner\s+is\s+)?(?:{_NOUN}\s+)?({_LABEL})"
    r"(?:\s+(?:is\s+(?:the\s+)?(?:better|best|winner)|wins))?[\W_]*$",
    re.IGNORECASE,
)


def parse_verdict(reply: str) -> Verdict | None:
    """Return which answer a reply prefers, or None where it does not say so plainly.

    The forms, of which the first that occurs decides: `[[A]]`, `[[B]]`, `[[C]]` or `[[tie]]`
    anywhere; a JSON object with one of the keys verdict, winner, choice, preference, preferred,
    better; a line `Verdict: A` (or Winner, Answer, ...); a last line that is a label alone, such as
    `A`, `**B**.`, `Answer A is better`, `tie`. In all but the last C is a tie, too. What stands in
    `<think>...</think>`, or before a `</think>` alone, is left out.

    Example:
        >>> parse_verdict("B is shorter, but right. [[B]]")
        'B'
        >>> parse_verdict('{"reason": "same", "winner": "tie"}')
        'tie'
        >>> parse_verdict("[[A]] or [[B]]?") is None
        True
    """
    # Many chat templates open the thoughts themselves, so that a reply has their end alone.
    text = re.split("</think>", _THOUGHTS.sub("", reply), flags=re.IGNORECASE)[-1]
    if "<think>" in text.lower():
        return None  # cut off while it was still thinking
    for form in (_marks, _objects, _named_lines, _last_line):
        found = list(form(text))
        if found:
            return found[0] if len(set(found)) == 1 else None
    return None


def _marks(text: str) -> Iterator[Verdict]:
    for label in _MARK.findall(text):
        yield _LABELS[label.lower()]


def _objects(text: str) -> Iterator[Verdict]:
    start = text.find("{")
    while start >= 0:
        try:
            fields, end = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            start = text.find("{", start + 1)
            continue
        start = text.find("{", end)
        for key, value in fields.items():
            if key.lower() in _JSON_KEYS and isinstance(value, str):
                match = _LAST_LINE.match(value)
                label = (match[1] if match else value.strip()).lower()
                if label in _LABELS:
                    yield _LABELS[label]


def _named_lines(text: str) -> Iterator[Verdict]:
    return _labels(_NAMED.findall(text))


def _last_line(text: str) -> Iterator[Verdict]:
    lines = text.strip().split("\n")
    return _labels(_LAST_LINE.findall(lines[-1]))


def _labels(found: Iterable[str]) -> Iterator[Verdict]:
    return (_LABELS[label.lower()] for label in found)
