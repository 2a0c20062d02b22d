"""Which TRL versions fusedpo.trl works with: the one place that says so. Importable without TRL
(the doctor reads it).

TRL's trainers change with every minor release, so a release that nobody has read and tested against
is refused rather than tried.
"""

from __future__ import annotations

import re
from importlib import metadata

__all__ = [
    "INSTALL_COMMAND",
    "SUPPORTED_RANGE_TEXT",
    "UnsupportedTRLError",
    "check",
    "installed",
    "require_supported",
]

_FIRST = (1, 15)  # the first release whose trainers all use the fused language-model head
_PAST = (1, 17)
SUPPORTED_RANGE_TEXT = "1.15.0 to 1.16.x"
INSTALL_COMMAND = 'pip install "trl>=1.15,<1.17"'


class UnsupportedTRLError(RuntimeError):
    """The installed TRL is not one that fusedpo knows, by version or by what it replaces there."""


def check(version: str) -> str | None:
    """Return None for a supported TRL `version`, else the reason and the remedy."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)$", version.strip())
    if match is None:
        return f"TRL's version must look like 1.16.0; got {version!r}. Use {INSTALL_COMMAND}"
    minor = (int(match[1]), int(match[2]))
    # 1.15.0.dev0 and 1.15.0rc1 come before 1.15.0.
    before_first = (
        minor == _FIRST and int(match[3] or 0) == 0 and re.match(r"\.?(dev|a|b|rc)", match[4])
    )
    if minor < _FIRST or before_first:
        return (
            f"TRL {version} is older than the supported range, {SUPPORTED_RANGE_TEXT}. "
            f"Upgrade: {INSTALL_COMMAND}"
        )
    if minor >= _PAST:
        return (
            f"TRL {version} is newer than the supported range, {SUPPORTED_RANGE_TEXT}. "
            f"Upgrade fusedpo, or go back: {INSTALL_COMMAND}"
        )
    return None


def installed() -> str | None:
    """Return the installed TRL's version without importing TRL, or None."""
    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError:
        return None


def require_supported() -> str:
    """Return the installed TRL's version.

    Raises:
        ImportError: TRL is not installed.
        UnsupportedTRLError: it is outside the supported range.
    """
    version = installed()
    if version is None:
        raise ImportError(
            f"fusedpo.trl needs TRL {SUPPORTED_RANGE_TEXT}, and found none: {INSTALL_COMMAND}"
        )
    problem = check(version)
    if problem is not None:
        raise UnsupportedTRLError(problem)
    return version
