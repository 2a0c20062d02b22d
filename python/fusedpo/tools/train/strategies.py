"""The names that `strategy` may have: which trainer each one stands for, and what it settles.

Every loss of DPOConfig is a strategy of its own, so that `strategy: ipo` is all that it takes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedpo import loss_types


@dataclass(frozen=True)
class Strategy:
    """A trainer and the options that a strategy's name implies."""

    name: str
    trainer: str  # a key of TRAINERS
    fixed: Mapping[str, Any] = field(default_factory=dict)  # another value contradicts the name
    defaults: Mapping[str, Any] = field(default_factory=dict)  # another value is the user's choice


# What the report calls them; where they come from is in `trainers.py`.
TRAINERS = {
    "dpo": "fusedpo.trl.FusedDPOTrainer",
    "sft": "trl.SFTTrainer",
    "kto": "trl.KTOTrainer",
    "cpo": "fusedpo.trl.cpo_orpo.FusedCPOTrainer",
    "orpo": "fusedpo.trl.cpo_orpo.FusedORPOTrainer",
}


def strategies() -> dict[str, Strategy]:
    """Return every strategy by its name.

    Example:

        >>> strategies()["ipo"].fixed
        {'loss_type': ['ipo']}
    """
    known = [Strategy(name, name) for name in TRAINERS]
    # In the paper beta is 2 to 10; at CPOConfig's 0.1 the loss hardly moves from its start.
    simpo = {"loss_type": "simpo"}
    known.append(Strategy("simpo", "cpo", fixed=simpo, defaults={"cpo_alpha": 0.0, "beta": 2.0}))
    known += [Strategy(name, "dpo", fixed={"loss_type": [name]}) for name in dpo_losses()]
    return {each.name: each for each in known}


def dpo_losses() -> list[str]:
    """The loss types of DPOConfig that may stand alone: `sft` is a term of a list there, and a
    strategy of its own here."""
    names = [name for name, each in loss_types().items() if "ref_chosen_logps" in each.needs]
    return [name for name in names if name != "sft"]


def find(name: object) -> Strategy:
    """Return a strategy.

    Raises:
        ValueError: there is none of that name; the message lists all of them.
    """
    known = strategies()
    if isinstance(name, str) and name in known:
        return known[name]
    raise ValueError(
        f"strategy must be one of {', '.join(known)}; got {name!r}.{did_you_mean(str(name), known)}"
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean a or b?", or nothing where no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""
