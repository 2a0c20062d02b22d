"""What a text alone tells about how it was made: loops, and strings that are no language.

Any language: words are separated by spaces, but for Chinese and Japanese, where each character
counts as one. Code between backticks is left out where the look of words is what counts.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter

from fusedpo.tools.patterns import Limits

_HAN_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_HAN_KANA}]|[^\W_{_HAN_KANA}]+")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`]*`|https?://\S+", re.DOTALL)
_CAPITAL_INSIDE = re.compile(r"[a-z\xdf-\xff][A-Z\xc0-\xde]")
_FEW_WORDS = 20  # no shares of fewer: one odd name would decide
_LONGEST_PERIOD = 30  # words; a loop of whole paragraphs shows in the n-grams
_DRAWING = frozenset("|-=_+*#.~>/\\")  # what tables and rules are made of
# Written together in one language, so that a change between them means nothing.
_EAST_ASIAN = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "KATAKANA-HIRAGANA", "IDEOGRAPHIC"}


def words_of(text: str) -> list[str]:
    """Return the words in lower case.

    >>> words_of("Don't panic: 42 \u6b22\u8fce!")
    ['don', 't', 'panic', '42', '\u6b22', '\u8fce']
    """
    return [word.lower() for word in _WORD.findall(text)]


def repetition(text: str, limits: Limits) -> str | None:
    """Tell how a text repeats itself, or None if it does not."""
    words, n = words_of(text), limits.repetition_words
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if len(grams) >= _FEW_WORDS:
        share = 1 - len(set(grams)) / len(grams)
        if share >= limits.repetition_share:
            gram, times = Counter(grams).most_common(1)[0]
            return f"{share:.0%} of {n}-grams repeat, {' '.join(gram)!r} {times} times"
    length, unit = _longest_loop(words)
    if length >= limits.loop_words:
        return f"{' '.join(unit)!r} over and over, for {length} words"
    return None


def _longest_loop(words: list[str]) -> tuple[int, list[str]]:
    """The longest stretch of words that repeats one unit at least three times, and that unit."""
    longest, unit = 0, words[:0]
    for period in range(1, _LONGEST_PERIOD + 1):
        run = 0  # words in a row that equal the word one period before
        for i in range(period, len(words)):
            run = run + 1 if words[i] == words[i - period] else 0
            if run >= 2 * period and run + period > longest:
                longest, unit = run + period, words[i - period + 1 : i + 1]
    return longest, unit


def degenerate(text: str, limits: Limits) -> str | None:
    """Tell why a text is no language, or None if it may be one."""
    if not any(character.isalnum() for character in text):
        return "no letter and no digit"
    # A cut at max_new_tokens may leave one broken character at the end of any text.
    broken = sum(map(_is_broken, text.rstrip("\ufffd"))) / len(text)
    if broken >= limits.broken_share:
        return f"{broken:.0%} of the characters are no text"
    character, share = _commonest(text)
    if share >= limits.one_character:
        return f"{share:.0%} of it is {character!r}"
    changes, scripts = _script_changes(text)
    if changes >= limits.script_changes and scripts >= limits.scripts:
        return f"{scripts} scripts, which change at {changes:.0%} of the letters"
    glued, length = _glued_words(text)
    if glued >= limits.glued_share and length >= limits.glued_length:
        return f"{glued:.0%} of the words are glued together, {length:.1f} letters on average"
    return None


def _is_broken(character: str) -> bool:
    return character == "\ufffd" or (
        unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") and character not in "\n\t\r"
    )


def _commonest(text: str) -> tuple[str, float]:
    counts = Counter(c for c in text if not c.isspace() and c not in _DRAWING)
    if counts.total() < _FEW_WORDS:
        return "", 0.0
    character, times = counts.most_common(1)[0]
    return character, times / counts.total()


@functools.cache
def _script(letter: str) -> str:
    # unicodedata has no script property; the first word of a letter's name is the script.
    script = unicodedata.name(letter, "?").split(" ")[0]
    return "EAST ASIAN" if script in _EAST_ASIAN else script


def _script_changes(text: str) -> tuple[float, int]:
    """The share of letters that follow one of another script, and the scripts that have 1 % of the
    letters or more."""
    scripts = [_script(c) for c in text if c.isalpha()]
    if len(scripts) < _FEW_WORDS:
        return 0.0, 0
    changes = sum(a != b for a, b in itertools.pairwise(scripts))
    used = [s for s, times in Counter(scripts).items() if times >= len(scripts) / 100]
    return changes / len(scripts), len(used)


def _glued_words(text: str) -> tuple[float, float]:
    """Of the different words that spaces separate: the share that look like several tokens with no
    space between, as in 'relocationlatSoviets', and how long the words are on average."""
    prose = _CODE.sub(" ", text)
    east = sum(_script(c) == "EAST ASIAN" for c in prose if c.isalpha())
    if 5 * east > sum(c.isalpha() for c in prose):
        return 0.0, 0.0  # written without spaces; the Latin words in it are names and code
    words = {"".join(c for c in word if c.isalpha()) for word in prose.split()} - {""}
    if len(words) < _FEW_WORDS:
        return 0.0, 0.0
    glued = sum(
        _CAPITAL_INSIDE.search(word) is not None or len(set(map(_script, word))) > 1
        for word in words
    )
    return glued / len(words), sum(map(len, words)) / len(words)
