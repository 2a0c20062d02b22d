"""The patterns and limits of the pathology checks: `patterns.yaml`, and a user's file on top."""

from __future__ import annotations

import os
import pathlib
import re
from dataclasses import dataclass, fields
from typing import Any

_WHERE = ("start", "anywhere")
_KEYS = {"where", "at_least", "per_words", "patterns"}
_OWN = pathlib.Path(__file__).with_name("patterns.yaml")


@dataclass(frozen=True)
class Limits:
    """The numbers of `patterns.yaml`, where each is explained."""

    start_characters: int
    verbosity_ratio: float
    repetition_words: int
    repetition_share: float
    loop_words: int
    broken_share: float
    glued_share: float
    glued_length: float
    script_changes: float
    scripts: int
    one_character: float


@dataclass(frozen=True)
class Phrases:
    """The patterns of one check, and how many matches count."""

    name: str
    where: str
    at_least: int
    per_words: int | None
    patterns: tuple[re.Pattern[str], ...]

    def find(self, text: str, words: int, start_characters: int) -> list[str]:
        """Return what matches in a text of that many words, or nothing if it is too little."""
        text = text.strip().replace("\u2019", "'")
        if self.where == "start":
            text = text[:start_characters]
        found = [match[0].strip(" \n.!?") for p in self.patterns for match in p.finditer(text)]
        if len(found) < self.at_least:
            return []
        if self.per_words is not None and words > self.per_words * len(found) / self.at_least:
            return []
        return found


@dataclass(frozen=True)
class Patterns:
    """Everything that the checks look for."""

    phrases: tuple[Phrases, ...]
    limits: Limits


def load_patterns(path: str | os.PathLike[str] | None = None) -> Patterns:
    """Return the package's patterns, extended by those of a file.

    Raises:
        ValueError: the file has another layout, or an expression that is none.
    """
    merged = _read(_OWN)
    if path is not None:
        extra = _read(pathlib.Path(path))
        for name, check in extra["phrases"].items():
            known = merged["phrases"].setdefault(name, {"patterns": []})
            merged["phrases"][name] = known | check
            merged["phrases"][name]["patterns"] = known["patterns"] + check["patterns"]
        merged["limits"] |= extra["limits"]
    return Patterns(
        tuple(
            Phrases(
                name,
                check.get("where", "anywhere"),
                check.get("at_least", 1),
                check.get("per_words"),
                tuple(re.compile(pattern, re.IGNORECASE) for pattern in check["patterns"]),
            )
            for name, check in merged["phrases"].items()
        ),
        Limits(**merged["limits"]),
    )


def _read(path: pathlib.Path) -> dict[str, Any]:
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content.keys() <= {"phrases", "limits"}:
        raise ValueError(f"{path} must hold phrases and limits, and nothing else.")
    content = {"phrases": content.get("phrases") or {}, "limits": content.get("limits") or {}}
    for name, check in content["phrases"].items():
        _check_phrases(f"{path}: {name}", check)
    known = {field.name for field in fields(Limits)}
    for name, value in content["limits"].items():
        if name not in known:
            raise ValueError(
                f"{path}: limits must be among {', '.join(sorted(known))}; got {name}."
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{path}: {name} must be a number above 0; got {value!r}.")
    return content


def _check_phrases(where: str, check: Any) -> None:
    if not isinstance(check, dict) or not isinstance(check.get("patterns"), list):
        raise ValueError(f"{where} must have a list of patterns; got {check!r}.")
    if unknown := check.keys() - _KEYS:
        raise ValueError(
            f"{where} may have {', '.join(sorted(_KEYS))}; got {', '.join(sorted(unknown))}."
        )
    if check.get("where", "anywhere") not in _WHERE:
        raise ValueError(f"{where}: where must be start or anywhere; got {check['where']!r}.")
    for key in ("at_least", "per_words"):
        value = check.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {key} must be a whole number above 0; got {value!r}.")
    for pattern in check["patterns"]:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{where}: {pattern!r} is no regular expression of Python ({error}). In YAML, put "
                "it in single quotes."
            ) from None
