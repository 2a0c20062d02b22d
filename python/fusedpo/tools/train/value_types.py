"""The types of options, by the annotations of the config classes.

Those classes store whatever they are given, and fail much later with another message.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any


def check_types(values: Mapping[str, Any], config_class: Any) -> None:
    """Raise ValueError where a value does not fit the annotation of its field."""
    hints = typing.get_type_hints(config_class)
    for key, value in values.items():
        if not _fits(value, hints[key]):
            raise ValueError(
                f"{key} must be {_told(hints[key])}; got {value!r} ({type(value).__name__})."
            )


def list_of_one(key: str, value: Any, *config_classes: Any) -> Any:
    """Return [value] for a string where a field takes lists of strings and no string."""
    for config_class in config_classes:
        hint = typing.get_type_hints(config_class).get(key)
        if isinstance(value, str) and hint is not None and not _fits(value, hint):
            return [value] if _fits([value], hint) else value
    return value


def _told(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, dict, list, type(None)):
        return isinstance(value, hint)
    return True  # enumerations, which transformers makes from strings and checks itself
