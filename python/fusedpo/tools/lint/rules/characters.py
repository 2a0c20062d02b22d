"""Characters that a person does not see, or that a broken conversion left behind."""

from __future__ import annotations

import re
from collections import Counter

from ..corpus import Corpus
from ..registry import Hits, rule

_KINDS = {
    "UTF-8 read as Latin-1": re.compile("[ÃÂ][\x80-\xbf]|â(?:€[\x80-\u2122]|[\x80-\xbf]{2})"),
    # From U+0080 on only where they are no part of the above.
    "control characters": re.compile(
        r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<![ÃÂâ\x80-\xbf])[\x80-\x9f]"
    ),
    "replacement characters (U+FFFD)": re.compile("\ufffd"),
    # Zero-width (non-)joiners are left out: Persian, Hindi and emoji need them.
    "invisible characters": re.compile("[\u200b\u2060\ufeff\u00ad]"),
    "direction overrides": re.compile("[\u202a-\u202e\u2066-\u2069]"),
    "line separators (U+2028, U+2029)": re.compile("[\u2028\u2029]"),
    "private-use characters": re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]"),
    "HTML entities": re.compile(r"&(?:amp|lt|gt|quot|nbsp|apos|#\d{1,6}|#x[0-9a-fA-F]{1,5});"),
}
_ANY = re.compile("|".join(kind.pattern for kind in _KINDS.values()))


@rule(
    "warning",
    "Mend the text where it was made (encoding, HTML) rather than here. Right where the text is "
    "about HTML or code.",
)
def suspicious_characters(corpus: Corpus) -> Hits | None:
    """A text holds characters that are seldom meant."""
    counts: Counter[str] = Counter()
    notes = {}
    for index, entry in enumerate(corpus.entries):
        texts = (entry.prompt, *entry.completions)
        if not any(_ANY.search(text) for text in texts):
            continue
        matches = {
            kind: match
            for kind, pattern in _KINDS.items()
            if (match := next(filter(None, map(pattern.search, texts)), None))
        }
        counts.update(matches.keys())
        kind, match = next(iter(matches.items()))
        notes[index] = f"{kind}: {_around(match)}"
    if not notes:
        return None
    kinds = ", ".join(f"{kind} in {count}" for kind, count in counts.most_common())
    what = f"Characters that are seldom meant, by rows: {kinds}."
    return Hits(list(notes), notes, what, figures=dict(counts))


def _around(match: re.Match[str]) -> str:
    """What was found with some text on both sides."""
    return match.string[max(0, match.start() - 20) : match.end() + 20]
