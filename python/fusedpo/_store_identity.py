"""identity.json: what a store was made with. Written once, whole or not at all; compared by field.

The identity is a JSON object of the caller. Its field "info", if there is one, is told and not
compared: library versions, dates. Everything else must be equal for two scores to be mixed, with
one exception: a field that a store does not know, and that stands at its default in this run, as
the list info["default_fields"] of dotted names says. So a library that grows a field does not make
every store another reference.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from typing import Any

from ._store_error import StoreError

NAME = "identity.json"
FORMAT = "fusedpo reference store"
VERSION = 1
DEFAULT_TOLERANCE = 1e-6


def canonical(value: Any) -> str:
    """JSON in one fixed spelling, ASCII: equal values have equal text."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def compared(identity: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key != "info"}


def digest(text: str) -> str:
    """BLAKE2b-128, as the C++ code computes it."""
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def normalised(identity: Any) -> dict[str, Any]:
    """The identity as JSON gives it back: tuples are lists. Raises StoreError for the rest."""
    if not isinstance(identity, dict):
        raise StoreError(
            f"identity must be a dict of JSON values; got {type(identity).__name__}", "bad_value"
        )
    try:
        result: dict[str, Any] = json.loads(canonical(identity))
    except (TypeError, ValueError) as e:
        raise StoreError(f"identity must consist of JSON values: {e}", "bad_value") from e
    return result


def document(identity: dict[str, Any], tolerance: float) -> bytes:
    """The content of identity.json."""
    if not (math.isfinite(tolerance) and 0 <= tolerance < 1):
        raise StoreError(f"tolerance must be in [0, 1); got {tolerance}", "bad_value")
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "tolerance": float(tolerance),
        "digest": digest(canonical(compared(identity))),
        "identity": identity,
    }
    content["checksum"] = digest(canonical(content))
    return (json.dumps(content, indent=2, ensure_ascii=True) + "\n").encode("ascii")


def parse(text: bytes, path: pathlib.Path) -> tuple[dict[str, Any], float]:
    """(identity, tolerance) from the content of identity.json."""
    where = str(path)

    def damaged(what: str, offset: int | None = None) -> StoreError:
        return StoreError(
            f"{where}: {what}. The file must not be edited: restore it, or make a new store",
            "damaged",
            where,
            offset,
        )

    try:
        content = json.loads(text.decode("ascii"))
    except UnicodeDecodeError as e:
        raise damaged("not ASCII", e.start) from e
    except json.JSONDecodeError as e:
        raise damaged(f"not JSON: {e.msg}", e.pos) from e
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StoreError(
            f'{where}: must be a JSON object with "format": "{FORMAT}"; this directory belongs to '
            "something else. Choose another one",
            "bad_magic",
            where,
        )
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise StoreError(
            f"{where}: format version {version}; this fusedpo knows version {VERSION}. "
            "Upgrade fusedpo",
            "future_version",
            where,
        )
    checksum = content.pop("checksum", None)
    identity, tolerance = content.get("identity"), content.get("tolerance")
    if (
        version != VERSION
        or not isinstance(identity, dict)
        or not isinstance(tolerance, float)
        or checksum != digest(canonical(content))
        or content.get("digest") != digest(canonical(compared(identity)))
    ):
        raise damaged("the checksum does not hold")
    return identity, tolerance


def _leaves(value: Any, name: str = "") -> dict[str, str]:
    """Dotted field names -> canonical values."""
    if isinstance(value, dict) and value:
        found: dict[str, str] = {}
        for key, inner in value.items():
            found.update(_leaves(inner, f"{name}.{key}" if name else str(key)))
        return found
    return {name: canonical(value)}


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def differences(ours: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """One sentence for each field that differs; [] when the two may be mixed."""
    mine, theirs = _leaves(compared(ours)), _leaves(compared(stored))
    info = ours.get("info")
    for name in info.get("default_fields", ()) if isinstance(info, dict) else ():
        if name not in theirs:
            mine.pop(name, None)
    return [
        f"{name}: the store has {_short(theirs.get(name, 'no such field'))}, "
        f"this run has {_short(mine.get(name, 'no such field'))}"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]


def check(identity: dict[str, Any], stored: dict[str, Any], path: pathlib.Path) -> None:
    """Raises StoreError that names the fields that differ."""
    different = differences(identity, stored)
    if different:
        raise StoreError(
            f"{path}: made with another identity, {len(different)} field(s) differ: "
            + "; ".join(different)
            + ". Values of different references must not be mixed: use another directory",
            "identity",
            str(path),
        )


def read(folder: pathlib.Path) -> tuple[dict[str, Any], float] | None:
    """(identity, tolerance) of the store in a directory, None where there is no store."""
    path = folder / NAME
    try:
        return parse(path.read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror}", "io", str(path)) from e
