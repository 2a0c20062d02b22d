"""Checks a data set of preferences before the training: `lint`, and the command `fusedpo lint`.

Every rule is a function in a module of `rules`; `RULES` has them by name.
"""

from __future__ import annotations

from .findings import Example, Finding, Fixed, LintReport, Removed
from .registry import Rule
from .rules import RULES
from .run import lint

__all__ = ["RULES", "Example", "Finding", "Fixed", "LintReport", "Removed", "Rule", "lint"]
