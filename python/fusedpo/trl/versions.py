"""Which TRL versions fusedpo.trl works with: the one place that says so. Importable without TRL
(the doctor reads it).

Older releases are refused. A newer one, which nobody has read and tested against, is tried: one
warning says so, and `fusedpo.trl.bindings` checks everything that is overridden, called or replaced
there.
"""

from __future__ import annotations

import functools
import re
import warnings
from importlib import metadata
from typing import NamedTuple

__all__ = [
    "PATCH",
    "TRAINER",
    "Support",
    "UnsupportedTRLError",
    "at_least",
    "installed",
    "untested",
]

_PAST = (1, 17)  # the first minor release that is newer than all tested ones
_LAST_TEXT = "1.16.x"


class UnsupportedTRLError(RuntimeError):
    """The installed TRL is too old, or what fusedpo binds to there is not what it knows."""


class Support(NamedTuple):
    """The TRL versions that one part of fusedpo.trl works with."""

    part: str
    first: tuple[int, int, int]

    @property
    def text(self) -> str:
        return f"{'.'.join(map(str, self.first))} to {_LAST_TEXT}"

    @property
    def install_command(self) -> str:
        first = ".".join(map(str, self.first))
        return f'pip install "trl>={first},<{".".join(map(str, _PAST))}"'

    def problem(self, version: str) -> str | None:
        """Return None for a TRL `version` that is not refused, else the reason and the remedy."""
        release = _release(version)
        if release is None:
            return (
                f"TRL's version must look like 1.16.0; got {version!r}. Use {self.install_command}"
            )
        if release >= (*self.first, 1):
            return None
        other = ""
        if self is not TRAINER and TRAINER.problem(version) is None:
            other = f" {TRAINER.part} works there, on TRL {TRAINER.text}."
        return (
            f"TRL {version} is older than what {self.part} supports, {self.text}.{other} "
            f"Upgrade: {self.install_command}"
        )

    def require(self) -> str:
        """Return the installed TRL's version; warn once in a process where it is untested.

        Raises:
            ImportError: TRL is not installed.
            UnsupportedTRLError: it is too old.
        """
        version = installed()
        if version is None:
            raise ImportError(
                f"fusedpo.trl needs TRL {self.text}, and found none: {self.install_command}"
            )
        problem = self.problem(version)
        if problem is not None:
            raise UnsupportedTRLError(problem)
        warning = untested(version)
        if warning is not None:
            _warn_once(warning)
        return version


TRAINER = Support("FusedDPOTrainer", (1, 9, 2))
# The first release whose trainers all use the fused language-model head, which the patch replaces.
PATCH = Support("patch_trl", (1, 15, 0))


def untested(version: str) -> str | None:
    """Return what to tell about a TRL `version` that is newer than all tested ones, or None."""
    release = _release(version)
    if release is None or release[:2] < _PAST:
        return None
    return (
        f"TRL {version} is newer than what fusedpo was tested with, {TRAINER.text}. What it binds "
        f"to there is checked; its numbers are not. Upgrade fusedpo, or: {TRAINER.install_command}"
    )


def installed() -> str | None:
    """Return the installed TRL's version without importing TRL, or None."""
    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError:
        return None


def at_least(major: int, minor: int) -> bool:
    """Tell whether the installed TRL belongs to `major.minor` or comes after it."""
    version = installed()
    release = None if version is None else _release(version)
    return release is not None and release[:2] >= (major, minor)


def _release(version: str) -> tuple[int, int, int, int] | None:
    """(major, minor, patch, 1), with 0 in the end for what comes before that release."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)$", version.strip())
    if match is None:
        return None
    before = re.match(r"\.?(dev|a|b|rc)", match[4])  # 1.15.0.dev0, 1.15.0rc1
    return int(match[1]), int(match[2]), int(match[3] or 0), 0 if before else 1


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(f"fusedpo: {text}", stacklevel=4)
