"""Which language a text is in. Offline, by py3langid; unsure answers are none."""

from __future__ import annotations

from functools import cache
from typing import Any

from .text import words

_READ = 200  # characters: more do not change the answer often, and cost time in proportion
_LEAST_WORDS = 6
_SURE = 0.8
_NO_LANGUAGE = "zxx"  # ISO 639's code for text without linguistic content


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    # Without the relatives of large languages that have no code of two letters (Wu, Cantonese,
    # Nigerian Pidgin, ...): next to them the detector is unsure of plain Chinese or English.
    known = [code for code in identifier.labels if len(code) == 2]
    identifier.set_languages([*known, _NO_LANGUAGE])
    return identifier


def detect(text: str) -> str:
    """Return the ISO 639 code of a text's language, or "" where it is too short or unclear.

    Example:
        >>> detect("The girl found a needle in her room, and gave it to her mother.")
        'en'
        >>> detect("Yes")
        ''
    """
    head = text.strip()[:_READ]
    if len(words(head)) < _LEAST_WORDS:
        return ""
    code: str
    code, confidence = _identifier().classify(head)
    if confidence < _SURE or code == _NO_LANGUAGE:
        return ""
    return code
