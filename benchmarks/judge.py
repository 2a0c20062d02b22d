"""Judges the results of a run against a table of targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Runs = dict[str, dict[str, Any]]  # name of a benchmark -> content of its JSON
Figure = Callable[[Runs], float]  # raises KeyError or StopIteration where there is no figure


class Target(NamedTuple):
    case: str
    floor: str
    target: str
    unit: str
    limit: float
    at_least: bool  # the limit is a lower bound
    measure: Figure
    floor_here: Figure | None = None  # the floor as measured in the same run, ms
    at_floor: Figure | None = None  # what `measure` would give if ours took the floor's time
    beside: Callable[[Runs], dict[str, float]] | None = None  # to be shown with it, by name
    cell: tuple[str, str] | None = None  # row and column, where a table has the targets in both

    def met_by(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def rows(targets: Iterable[Target], runs: Runs) -> list[dict[str, Any]]:
    """One dict per target; a rehearsal shows that a figure would be found, and is no verdict.

    `forbidden` says of a missed target that the floor measured in the same run would miss it, too.
    """
    rehearsal = any(run.get("rehearsal") for run in runs.values())
    found = []
    for t in targets:
        row: dict[str, Any] = {"case": t.case, "floor": t.floor, "target": t.target}
        if t.cell is not None:
            row["cell"] = list(t.cell)
        try:
            value = t.measure(runs)
        except (KeyError, StopIteration):
            found.append(row | {"measured": None, "met": None})
            continue
        if rehearsal:
            found.append(row | {"measured": None, "met": None, "rehearsed": value})
            continue
        row |= {"measured": value, "unit": t.unit, "met": t.met_by(value)}
        if t.beside is not None:
            row["beside"] = t.beside(runs)
        if t.floor_here is not None:
            row["floor_measured_ms"] = t.floor_here(runs)
        if t.at_floor is not None:
            row["at_floor"] = t.at_floor(runs)
            row["forbidden"] = not row["met"] and not t.met_by(row["at_floor"])
        found.append(row)
    return found


def verdict(row: dict[str, Any]) -> str:
    if row["met"] is None:
        return "not measured"
    if row["met"]:
        return "met"
    return "missed: the floor itself misses it" if row.get("forbidden") else "missed"


def show(found: list[dict[str, Any]]) -> None:
    """Prints the rows that have a figure, and says how many have none."""
    print()
    for row in (r for r in found if r["measured"] is not None):
        notes = [f"floor {row['floor']}"] if row["floor"] else []
        if "floor_measured_ms" in row:
            notes.append(f"{row['floor_measured_ms']:.3f} ms here")
        if "at_floor" in row:
            notes.append(f"at the floor it were {row['at_floor']:.3g}")
        notes += [f"{name} {value:.3g}" for name, value in row.get("beside", {}).items()]
        note = f" ({', '.join(notes)})" if notes else ""
        print(f"{verdict(row):6} {row['case']}: {row['measured']:.3f} {row['unit']}, "
              f"target {row['target']}{note}")  # fmt: skip
    missing = sum(r["measured"] is None for r in found)
    rehearsed = sum("rehearsed" in r for r in found)
    note = f" ({rehearsed} of them rehearsed)" if rehearsed else ""
    print(f"{missing} of {len(found)} targets not measured here{note}")
