"""Names of the cases of a CPU benchmark, and the command line that picks them.

A case is a frozen dataclass: first fields with words, then numbers with defaults. Its name has the
words and the numbers that differ from their defaults, as in fp32-frozen-V32000-N64.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from benchmarks.contest import Limits

C = TypeVar("C", bound="Case")


@dataclasses.dataclass(frozen=True)
class Case:
    WORDS: ClassVar[Sequence[Sequence[str]]]  # the values of the first fields

    @property
    def name(self) -> str:
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                parts.append(value)
            elif value != field.default:
                parts.append(f"{field.name}{value}")
        return "-".join(parts)

    @classmethod
    def parse(cls: type[C], name: str) -> C:
        """The case of that name; ValueError says how names are formed."""
        words = "-".join(f"({'|'.join(values)})" for values in cls.WORDS)
        numbers = [f.name for f in dataclasses.fields(cls)][len(cls.WORDS) :]
        match = re.fullmatch(rf"{words}((?:-(?:{'|'.join(numbers)})[1-9][0-9]*)*)", name)
        if match is None:
            raise ValueError(
                f"a case must be {words}, then any of {', '.join(numbers)} with a number, each "
                f"after a hyphen; got {name!r}"
            )
        *first, rest = match.groups()
        return cls(*first, **{k: int(v) for k, v in re.findall("-([A-Za-z]+)([0-9]+)", rest)})


def options_of(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    kind: type[C],
    groups: Mapping[str, Sequence[C]],
    peers: Sequence[str],
) -> argparse.Namespace:
    """Parses `arguments`; `.cases` is a list of `kind`, `.limits` the Limits, `.peers` a list."""
    parser.add_argument(
        "--cases",
        default=",".join(groups),
        help=f"names of cases, or of groups of them: {', '.join(groups)}; default all",
    )
    parser.add_argument("--peers", default=",".join(peers), help="default all: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, help="JSON; default in results/<machine>/")
    parser.add_argument(
        "--max-seconds", type=float, default=8.0, help="per call; a longer one is extrapolated"
    )
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="for the timed rounds of a case, 3 to 31"
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds, 2 s per call")
    options = parser.parse_args(arguments)
    chosen: list[C] = []
    for name in options.cases.split(","):
        try:
            chosen += groups.get(name) or [kind.parse(name)]
        except ValueError as error:
            parser.error(str(error))
    options.peers = options.peers.split(",")
    if unknown := sorted(set(options.peers) - set(peers)):
        parser.error(f"--peers must be of {', '.join(peers)}; got {', '.join(unknown)}")
    options.cases = list(dict.fromkeys(chosen))
    options.limits = Limits(options.max_seconds, options.seconds, (3, 31))
    if options.quick:
        options.limits = Limits(2.0, 0.0, (3, 3))
    return options


def fields_of(case: Case) -> dict[str, Any]:
    """What the JSON says of a case."""
    return {"name": case.name, **dataclasses.asdict(case)}
