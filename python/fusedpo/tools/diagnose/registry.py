"""The rules by name. A rule is one function; @rule above it is all there is to adding one."""

from __future__ import annotations

from collections.abc import Callable

from .evidence import Case
from .findings import Finding

# Returns None where it finds nothing; raises CannotTell where the run has not what it needs.
Rule = Callable[[Case], Finding | None]

RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Register a rule under its function's name."""
    RULES[function.__name__] = function
    return function
