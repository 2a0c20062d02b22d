"""python -m benchmarks.plot FOLDER: PNGs from the JSON of one machine's CPU benchmarks, beside it.

head.png and logits.png: every contestant's time over the floor's; the files in _axes.png: the same
along vocabulary, rows, completion share and threads. memory.png: peak extra memory. Needs
matplotlib. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.contest import timed

# One colour and one name for a contestant in every figure.
STYLES: dict[str, tuple[str, str]] = {
    "ours": ("fusedpo", "#d62728"),
    "ours_all": ("fusedpo, all five", "#ff7f6e"),
    "ours_inplace": ("fusedpo in place", "#8c1515"),
    "ours_all_inplace": ("fusedpo in place, all five", "#e377c2"),
    "trl": ("TRL", "#1f77b4"),
    "eager": ("eager", "#7f7f7f"),
    "compile": ("torch.compile", "#2ca02c"),
    "compile_all": ("torch.compile, all five", "#98df8a"),
    "torch_chunked": ("torch chunked", "#9467bd"),
    "liger_dpo": ("Liger DPO", "#bcbd22"),
    "floor": ("floor", "#000000"),
    "floor_inplace": ("floor in place", "#555555"),
    "floor_fp32": ("floor in fp32", "#aaaaaa"),
}
FLOORS = ("floor", "floor_inplace", "floor_fp32")
UNITS = ("floor", "floor_fp32")  # the faster of these is 1
# What varies along the axis of a panel, and what it is called.
AXES = {"V": "vocabulary", "N": "completion rows", "share": "completion, % of positions",
        "threads": "threads"}  # fmt: skip
Cases = list[dict[str, Any]]


def floor_of(case: Mapping[str, Any]) -> float:
    """Seconds of the bare products in the dtype that this processor multiplies faster, or of the
    bytes: torch's bf16 products bound nothing without bf16 instructions."""
    peers = case["peers"]
    return min(peers[n]["median_s"] for n in UNITS if timed(peers.get(n, {})))


def bars(cases: Cases, path: pathlib.Path, title: str) -> None:
    """A panel per case: how many times the floor each contestant takes."""
    if not cases:
        print(f"{path.name} is not drawn: no case has the default sizes")
        return
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(4.4 * columns, 2.6 * lines), squeeze=False, layout="constrained"
    )
    for panel, case in zip(panels.flat, cases, strict=False):
        names = [n for n in STYLES if timed(case["peers"].get(n, {})) and n not in UNITS]
        values = [case["peers"][n]["median_s"] / floor_of(case) for n in names]
        panel.barh([STYLES[n][0] for n in names], values, color=[STYLES[n][1] for n in names])
        for y, (name, value) in enumerate(zip(names, values, strict=True)):
            scaled = "*" if "extrapolated_from_V" in case["peers"][name] else ""
            panel.text(value, y, f" {value:.2f}{scaled}", va="center", fontsize=8)
        panel.axvline(1.0, color="black", linewidth=1)
        panel.set_xscale("log")
        panel.set_xlim(0.5, 1.6 * max([*values, 1.0]))
        number_ticks(panel.xaxis, 0.5, max([*values, 1.0]))
        panel.invert_yaxis()
        panel.tick_params(labelsize=8)
        panel.set_title(f"{case['name']} (floor {1e3 * floor_of(case):,.1f} ms)", fontsize=9)
    for panel in panels.flat[len(cases) :]:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def along(cases: Cases, axis: str, fixed: Mapping[str, Any]) -> Cases:
    """The cases that differ from `fixed` in `axis` alone, in its order."""
    found = [c for c in cases if all(c[key] == value for key, value in fixed.items())]
    return sorted(found, key=lambda case: case[axis])


def lines(groups: Iterable[tuple[str, str, Cases]], path: pathlib.Path, title: str) -> None:
    """A panel per (axis, heading, cases): times the floor over the axis, both logarithmic."""
    groups = [group for group in groups if len(group[2]) > 1]
    if not groups:
        print(f"{path.name} is not drawn: no two cases differ along an axis")
        return
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(4.4 * columns + 1, 3.4 * rows), squeeze=False, layout="constrained"
    )
    for panel, (axis, heading, cases) in zip(panels.flat, groups, strict=False):
        highest = 1.0
        for name, (label, colour) in STYLES.items():
            found = [case for case in cases if timed(case["peers"].get(name, {}))]
            points = [(c[axis], c["peers"][name]["median_s"] / floor_of(c)) for c in found]
            if points:
                style = "--" if name in FLOORS else ".-"
                panel.plot(*zip(*points, strict=True), style, color=colour, label=label)
                highest = max([highest, *(ratio for _, ratio in points)])
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.minorticks_off()
        ticks = [case[axis] for case in cases]
        panel.set_xticks(ticks, [f"{t // 1000}k" if t >= 10_000 else str(t) for t in ticks],
                         fontsize=8, rotation=40)  # fmt: skip
        number_ticks(panel.yaxis, 0.5, highest)
        panel.set_xlabel(f"{AXES[axis]} ({heading})", fontsize=8)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(groups) :]:
        panel.set_axis_off()
    for panel in panels[:, 0]:
        panel.set_ylabel("times the floor", fontsize=8)
    handles = {
        label: handle
        for panel in panels.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def number_ticks(axis: Any, lowest: float, highest: float) -> None:
    """1, 2, 5, 10... on a logarithmic axis, as plain numbers."""
    ticks = [m * 10**e for e in range(-1, 5) for m in (1, 2, 5)]
    ticks = [tick for tick in ticks if lowest <= tick <= 1.6 * highest]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axis.set_ticks([], minor=True)


def memory(cases: Cases, path: pathlib.Path) -> None:
    heights = [1 + len(case["peers"]) for case in cases]
    figure, panels = pyplot.subplots(
        len(cases), 1, figsize=(7, 0.5 + 0.24 * sum(heights)), layout="constrained", sharex=True,
        height_ratios=heights, squeeze=False,
    )  # fmt: skip
    for panel, case in zip(panels.flat, cases, strict=True):
        found = {n: r["extra_bytes"] / 1e6 for n, r in case["peers"].items() if "extra_bytes" in r}
        panel.barh([STYLES[n][0] for n in found], list(found.values()),
                   color=[STYLES[n][1] for n in found])  # fmt: skip
        for y, value in enumerate(found.values()):
            panel.text(value, y, f" {value:,.0f}", va="center", fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.12)
        panel.tick_params(labelsize=8)
        panel.set_title(f"{case['level']}, {case['name']}", fontsize=8, loc="left")
    panels[-1, 0].set_xlabel("peak extra memory of one call, MB", fontsize=9)
    save(figure, path)


def save(figure: Any, path: pathlib.Path) -> None:
    # No date and no version of matplotlib: the same JSON gives the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    print(f"wrote {path}")


def plot_head(content: dict[str, Any], folder: pathlib.Path) -> None:
    cases: Cases = content["cases"]
    bars([c for c in cases if c["name"].count("-") == 1], folder / "head.png",
         "from hidden states: times the bare GEMMs (* scaled up from a part of V)")  # fmt: skip
    base = {"dtype": "fp32", "head": "frozen", "H": 896, "T": 0}
    small = base | {"V": 32_000}
    groups = [
        ("V", "fp32, frozen, N 256", along(cases, "V", base | {"N": 256, "share": 50})),
        ("V", "bf16, frozen, N 256",
         along(cases, "V", base | {"dtype": "bf16", "N": 256, "share": 50})),
        ("N", "fp32, frozen, V 32,000", along(cases, "N", small | {"share": 50})),
        ("share", "fp32, frozen, V 32,000", along(cases, "share", small | {"N": 256})),
        ("threads", "fp32, frozen, V 32,000",
         along(cases, "threads", {k: v for k, v in small.items() if k != "T"} | {"N": 256,
                                                                             "share": 50})),
    ]  # fmt: skip
    lines(groups, folder / "head_axes.png", "from hidden states, forward and backward")


def plot_logits(content: dict[str, Any], folder: pathlib.Path) -> None:
    cases: Cases = content["cases"]
    bars([c for c in cases if c["name"].count("-") == 1], folder / "logits.png",
         "logits that exist, 256 x 151,936: times the bytes that must move")  # fmt: skip
    groups: list[tuple[str, str, Cases]] = []
    for way in ("forward", "backward"):
        base = {"way": way, "dtype": "fp32", "T": 0}
        small = base | {"V": 32_000}
        groups += [
            ("V", f"{way}, fp32, N 256", along(cases, "V", base | {"N": 256, "share": 100})),
            ("N", f"{way}, fp32, V 32,000", along(cases, "N", small | {"share": 100})),
            ("share", f"{way}, fp32, V 32,000", along(cases, "share", small | {"N": 256})),
            ("threads", f"{way}, fp32, V 151,936",
             along(cases, "threads", {"way": way, "dtype": "fp32", "V": 151_936, "N": 256,
                                      "share": 100})),
        ]  # fmt: skip
    lines(groups[:4], folder / "logits_forward_axes.png", "logits that exist, forward")
    lines(groups[4:], folder / "logits_backward_axes.png",
          "logits that exist, forward and backward")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args(arguments).folder
    makers: dict[str, Callable[[dict[str, Any], pathlib.Path], None]] = {
        "head": plot_head,
        "logits": plot_logits,
        "memory": lambda content, folder: memory(content["cases"], folder / "memory.png"),
    }
    found = [name for name in makers if (folder / f"{name}.json").exists()]
    if not found:
        parser.error(f"no head.json, logits.json or memory.json in {folder}")
    for name in found:
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        makers[name](content, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
